"""What a call of a Triton op allocates depends on shapes alone: its results, and what passes between two launches."""

import pytest
import torch
from test_converge import random_state
from torch.utils._python_dispatch import TorchDispatchMode

from cllm_kernels.ops.state_fields import FIELDS

if torch.cuda.is_available():
    pytest.skip("compiled for the GPU here, see test_ops_on_gpu.py", allow_module_level=True)

from cllm_kernels.triton import append_kv, block_attention, configs, converge, lm_head_argmax


class Allocations(TorchDispatchMode):
    """Bytes of each tensor that is made, zero-sized ones left out, with which the interpreter looks at tensors."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if "empty" in op.name() and result.numel():
            self.bytes.append(result.nbytes)
        return result


@pytest.mark.parametrize(("lengths", "capacity"), [([3, 0], 2048), ([2000, 700], 2048), ([5, 1], 128)])
def test_block_attention(lengths, capacity):
    query, keys = torch.randn(2, 4, 6, 16), torch.randn(2, 2, capacity, 16)
    lengths, starts = torch.tensor([lengths, [0, 0]], dtype=torch.int32)
    with Allocations() as made:
        block_attention.block_attention(query, keys, keys, lengths.clamp(max=capacity - 4), starts, None, 0, 0.0, None, 4)
    rows = 4 * 3
    splits = configs.splits(capacity, 4, configs.attention_config(16, 16, query.dtype, rows).block_rows)
    partial = [] if splits == 1 else [2 * 2 * splits * rows * 16 * 4, 2 * 2 * splits * rows * 4]
    assert made.bytes == [query.nbytes, 2 * 6 * 4 * 4, *partial]
    assert (splits > 1) == (capacity == 2048)


def test_append_kv():
    caches, window = [torch.randn(2, 2, 20, 8) for _ in range(2)], [torch.randn(2, 2, 4, 8) for _ in range(2)]
    with Allocations() as made:
        append_kv.append_kv_(*caches, *window, torch.tensor([1, 2], dtype=torch.int32), *torch.randn(2, 2, 4, 6), None)
    assert made.bytes == []


def test_converge():
    state = random_state(torch.Generator().manual_seed(0), 3, 4, 50, limit=40)
    tensors = {name: tensor for (name, *_), tensor in zip(FIELDS, state.tensors(), strict=True)}
    sizes = state.output.size(1), state.context.size(1), state.eos.size(0)
    with Allocations() as made:
        converge.converge_(torch.randn(3, 4, 20000), tensors, sizes, "window", "context", 0.0)
    assert made.bytes == [3 * 4 * 3 * 8]


def test_lm_head_argmax():
    with Allocations() as made:
        lm_head_argmax.lm_head_argmax(torch.randn(2, 3, 16), torch.randn(500, 16), None, 1.0, 0.0)
    tiles = -(-500 // configs.lm_head_config(torch.float32, 6).block_vocabulary)
    assert made.bytes == [6 * 8, 6 * 4, 6 * tiles * 8]
