import math

import pytest
import torch

from cllm_kernels.ops import append_kv_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(batch=3, heads=2, capacity=20, width=4, dim=8, value_dim=12, dtype=torch.float32):
    shapes = [(capacity, dim), (capacity, value_dim), (width, dim), (width, value_dim)]
    return [torch.randn(batch, heads, *shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 4, 17, 20])
def test_writes_the_window_and_nothing_else(width, dtype, backend):
    key_cache, value_cache, key, value = make(width=width, dtype=dtype)
    lengths = torch.tensor([0, 20 - width, (20 - width) // 2], dtype=torch.int32)
    want = [key_cache.clone(), value_cache.clone()]
    for row, length in enumerate(lengths.tolist()):
        want[0][row, :, length : length + width] = key[row]
        want[1][row, :, length : length + width] = value[row]
    assert append_kv_(key_cache, value_cache, key, value, lengths, backend) is None
    assert torch.equal(key_cache, want[0]) and torch.equal(value_cache, want[1])


def test_strides(backend):
    """Transposed views as transformers hands them, into a cache that is a slice of a larger one."""
    store = torch.full((2, 3, 30, 24), math.nan)
    key_cache, value_cache = store[:, 1:, 5:25, 4:12], store[:, :2, 4:24, 12:24]
    key, value = torch.randn(2, 4, 2, 8).transpose(1, 2), torch.randn(2, 4, 2, 12).transpose(1, 2)
    lengths = torch.tensor([[3, 0], [16, 0]], dtype=torch.int32)[:, 0]
    append_kv_(key_cache, value_cache, key, value, lengths, backend)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(key_cache[row, :, length : length + 4], key[row])
        assert torch.equal(value_cache[row, :, length : length + 4], value[row])
    assert store.isfinite().sum() == key.numel() + value.numel()


def test_large(backend):
    """Enough bytes that the C++ backend uses threads."""
    key_cache, value_cache, key, value = make(batch=2, heads=8, capacity=600, width=512, dim=64, value_dim=64)
    append_kv_(key_cache, value_cache, key, value, torch.tensor([7, 88], dtype=torch.int32), backend)
    assert torch.equal(key_cache[0, :, 7:519], key[0]) and torch.equal(value_cache[1, :, 88:], value[1])


@pytest.mark.parametrize("lengths", [[0, -1, 3], [0, 3, 17], [0, 0, 2**31 - 1]], ids=str)
def test_a_row_without_room_stops_all_rows(lengths, backend):
    key_cache, value_cache, key, value = make()
    before = key_cache.clone(), value_cache.clone()
    with pytest.raises(ValueError, match=r"row [12] has length .* n = 4 .* S = 20"):
        append_kv_(key_cache, value_cache, key, value, torch.tensor(lengths, dtype=torch.int32), backend)
    assert torch.equal(key_cache, before[0]) and torch.equal(value_cache, before[1])


BAD = {
    "key_cache has shape": lambda a: {"key_cache": a["key_cache"][0]},
    "key has shape": lambda a: {"key": a["key"][:, :1]},
    "value has shape": lambda a: {"value": a["value"][:, :, :2]},
    "value_cache has shape": lambda a: {"value_cache": a["value_cache"][:, :, :5]},
    "key has dtype torch.float16": lambda a: {"key": a["key"].half()},
    "key_cache has dtype torch.int64": lambda a: {name: a[name].long() for name in a if "e" in name[:4]},
    "key has strides": lambda a: {"key": a["key"].transpose(2, 3).contiguous().transpose(2, 3)},
    "lengths has dtype": lambda a: {"lengths": a["lengths"].float()},
    "lengths has shape": lambda a: {"lengths": a["lengths"][:2]},
    "value is on meta": lambda a: {"value": a["value"].to("meta")},
    "n = 21 rows": lambda a: {"key": torch.zeros(3, 2, 21, 8), "value": torch.zeros(3, 2, 21, 12)},
    "backend is ''": lambda a: {"backend": ""},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, backend):
    names = ("key_cache", "value_cache", "key", "value")
    arguments = dict(zip(names, make()), lengths=torch.zeros(3, dtype=torch.int32), backend=backend)
    before = arguments["key_cache"].clone(), arguments["value_cache"].clone()
    change = BAD[message](arguments)
    if "lengths" not in message:
        change.pop("lengths", None)
    with pytest.raises(ValueError, match=message):
        append_kv_(**arguments | change)
    assert torch.equal(arguments["key_cache"], before[0]) and torch.equal(arguments["value_cache"], before[1])


def test_opcheck(backend):
    lengths = torch.tensor([0, 3, 16], dtype=torch.int32)
    torch.library.opcheck(torch.ops.cllm_kernels.append_kv_.default, (*make(), lengths, backend))
