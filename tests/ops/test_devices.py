"""Triton launches on the current device, so the ops make that of their tensors the current one."""

import contextlib

import pytest
import torch
from test_append_kv import make as append_case
from test_block_attention import make as attention_case

from cllm_kernels.ops import JacobiState, append_kv_, block_attention, converge_, lm_head_argmax

STATE = dict(limits=5, block_size=4)
CALLS = {
    "append_kv_": lambda: append_kv_(*append_case(), torch.zeros(3, dtype=torch.int32), backend="triton"),
    "block_attention": lambda: block_attention(*attention_case(4, 2, 3, [5]), backend="triton"),
    "converge_": lambda: converge_(
        torch.randn(1, 4, 7), JacobiState.create(torch.ones(1, 2, dtype=torch.int64), **STATE), backend="triton"
    ),
    "lm_head_argmax": lambda: lm_head_argmax(torch.randn(1, 2, 8), torch.randn(5, 8), backend="triton"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs Triton itself, see test_ops_on_gpu.py")
@pytest.mark.parametrize("op", CALLS)
def test_the_device_of_the_tensors_is_current(op, monkeypatch):
    pytest.importorskip("triton")
    inside, launches = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    from triton.runtime.interpreter import InterpretedFunction

    plain = InterpretedFunction.run
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *a, **k: launches.append(len(inside)) or plain(self, *a, **k))
    CALLS[op]()
    assert launches and set(launches) == {1} and not inside
