import math

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cllm_kernels.ops import append_kv_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Angles come in the dtype of the keys or in float32.
ANGLES = [(dtype, dtype) for dtype in DTYPES] + [(dtype, torch.float32) for dtype in DTYPES[1:]]


def make_angles(batch, width, rotary, dtype):
    """As transformers makes them: both halves hold the same angles."""
    angles = 100 * torch.rand(batch, width, rotary // 2).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


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
    assert append_kv_(key_cache, value_cache, key, value, lengths, backend=backend) is None
    assert torch.equal(key_cache, want[0]) and torch.equal(value_cache, want[1])


def test_strides(backend):
    """Transposed views as transformers hands them, into a cache that is a slice of a larger one."""
    store = torch.full((2, 3, 30, 24), math.nan)
    key_cache, value_cache = store[:, 1:, 5:25, 4:12], store[:, :2, 4:24, 12:24]
    key, value = torch.randn(2, 4, 2, 8).transpose(1, 2), torch.randn(2, 4, 2, 12).transpose(1, 2)
    lengths = torch.tensor([[3, 0], [16, 0]], dtype=torch.int32)[:, 0]
    append_kv_(key_cache, value_cache, key, value, lengths, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(key_cache[row, :, length : length + 4], key[row])
        assert torch.equal(value_cache[row, :, length : length + 4], value[row])
    assert store.isfinite().sum() == key.numel() + value.numel()


def test_large(backend):
    """Enough bytes that the C++ backend uses threads."""
    key_cache, value_cache, key, value = make(batch=2, heads=8, capacity=600, width=512, dim=64, value_dim=64)
    append_kv_(key_cache, value_cache, key, value, torch.tensor([7, 88], dtype=torch.int32), backend=backend)
    assert torch.equal(key_cache[0, :, 7:519], key[0]) and torch.equal(value_cache[1, :, 88:], value[1])


@pytest.mark.parametrize(("dtype", "angle_dtype"), ANGLES, ids=str)
@pytest.mark.parametrize(
    ("dim", "rotary"), [(8, 8), (8, 2), (6, 6), (64, 64), (80, 32), (96, 38), (128, 128), (33, 18)]
)
def test_rotates_keys_as_transformers(dim, rotary, dtype, angle_dtype, backend):
    """Bit for bit, into a cache full of NaN, of which only the window is written."""
    key_cache, value_cache, key, value = make(width=5, dim=dim, dtype=dtype)
    key_cache.fill_(math.nan)
    value_cache.fill_(math.nan)
    lengths = torch.tensor([0, 15, 7], dtype=torch.int32)
    cos, sin = make_angles(3, 5, rotary, angle_dtype)
    _, turned = apply_rotary_pos_emb(key[..., :rotary], key[..., :rotary], cos, sin)
    turned = torch.cat((turned.to(dtype), key[..., rotary:]), -1)
    append_kv_(key_cache, value_cache, key, value, lengths, cos, sin, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(key_cache[row, :, length : length + 5], turned[row])
        assert torch.equal(value_cache[row, :, length : length + 5], value[row])
    assert key_cache.isfinite().sum() == key.numel() and value_cache.isfinite().sum() == value.numel()


def test_rotates_strided_keys(backend):
    """Halves of cos that differ, angles shared by the batch's rows, and keys as transformers hands them."""
    key_cache, value_cache, _, value = make()
    key = torch.randn(3, 4, 2, 8).transpose(1, 2)
    cos, sin = (torch.randn(4, 16)[:, 4:10].expand(3, 4, 6) for _ in range(2))
    turned = key[..., :6] * cos[:, None] + torch.cat((-key[..., 3:6], key[..., :3]), -1) * sin[:, None]
    append_kv_(key_cache, value_cache, key, value, torch.tensor([1, 2, 3], dtype=torch.int32), cos, sin, backend=backend)
    for row, length in enumerate((1, 2, 3)):
        assert torch.equal(key_cache[row, :, length : length + 4, :6], turned[row])
        assert torch.equal(key_cache[row, :, length : length + 4, 6:], key[row, :, :, 6:])


@pytest.mark.parametrize(("dtype", "angle_dtype"), ANGLES, ids=str)
@pytest.mark.parametrize(("dim", "rotary"), [(8, 8), (6, 6), (80, 32), (96, 38), (128, 128), (33, 18)])
def test_rotates_queries_as_keys(dim, rotary, dtype, angle_dtype, backend):
    """In place, as a slice of a larger tensor, beside which nothing changes."""
    key_cache, value_cache, key, value = make(width=17, dim=dim, dtype=dtype)
    store = torch.randn(3, 17, 7, dim + 3).to(dtype)
    query, want, before = store[:, :, 1:6, :dim], store.clone(), key.clone()
    cos, sin = make_angles(3, 17, rotary, angle_dtype)
    for tensor in (cos, sin):  # halves that differ
        tensor[..., : rotary // 2] *= -0.5
    lengths = torch.tensor([0, 3, 1], dtype=torch.int32)
    turned, _ = apply_rotary_pos_emb(query.transpose(1, 2)[..., :rotary], key[..., :rotary], cos, sin)
    want[:, :, 1:6, :rotary] = turned.transpose(1, 2).to(dtype)
    append_kv_(key_cache, value_cache, key, value, lengths, cos, sin, query, backend=backend)
    assert torch.equal(store, want) and torch.equal(key, before)
    _, turned = apply_rotary_pos_emb(key[..., :rotary], key[..., :rotary], cos, sin)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(key_cache[row, :, length : length + 17, :rotary], turned[row].to(dtype))


@pytest.mark.parametrize("lengths", [[0, -1, 3], [0, 3, 17], [0, 0, 2**31 - 1]], ids=str)
def test_a_row_without_room_stops_all_rows(lengths, backend):
    key_cache, value_cache, key, value = make()
    before = key_cache.clone(), value_cache.clone()
    with pytest.raises(ValueError, match=r"row [12] has length .* n = 4 .* S = 20"):
        append_kv_(key_cache, value_cache, key, value, torch.tensor(lengths, dtype=torch.int32), backend=backend)
    assert torch.equal(key_cache, before[0]) and torch.equal(value_cache, before[1])


def angles(**rest):
    return {name: torch.zeros(3, 4, 8) for name in ("cos", "sin")} | rest


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
    "sin is None although cos is given": lambda a: {"cos": torch.zeros(3, 4, 8)},
    "cos is None although sin is given": lambda a: {"sin": torch.zeros(3, 4, 8)},
    "cos has R = 7; it must be even": lambda a: {name: torch.zeros(3, 4, 7) for name in ("cos", "sin")},
    "cos has R = 10; .* from 2 to D = 8": lambda a: {name: torch.zeros(3, 4, 10) for name in ("cos", "sin")},
    "cos has R = 0": lambda a: {name: torch.zeros(3, 4, 0) for name in ("cos", "sin")},
    r"cos has shape \(1, 4, 8\)": lambda a: {name: torch.zeros(1, 4, 8) for name in ("cos", "sin")},
    r"cos has shape \(4, 8\)": lambda a: {name: torch.zeros(4, 8) for name in ("cos", "sin")},
    r"sin has shape \(3, 4, 6\)": lambda a: {"cos": torch.zeros(3, 4, 8), "sin": torch.zeros(3, 4, 6)},
    "cos has dtype torch.float16": lambda a: {name: torch.zeros(3, 4, 8).half() for name in ("cos", "sin")},
    "sin has dtype torch.float64": lambda a: {"cos": torch.zeros(3, 4, 8), "sin": torch.zeros(3, 4, 8).double()},
    "cos is on meta": lambda a: {name: torch.zeros(3, 4, 8, device="meta") for name in ("cos", "sin")},
    "sin has strides": lambda a: {"cos": torch.zeros(3, 4, 8), "sin": torch.zeros(3, 8, 4).transpose(1, 2)},
    "query is given without cos and sin": lambda a: {"query": torch.zeros(3, 4, 2, 8)},
    r"query has shape \(3, 5, 2, 8\)": lambda a: angles(query=torch.zeros(3, 5, 2, 8)),
    r"query has shape \(3, 4, 8\)": lambda a: angles(query=torch.zeros(3, 4, 8)),
    "query has dtype torch.float16": lambda a: angles(query=torch.zeros(3, 4, 2, 8).half()),
    "query has strides": lambda a: angles(query=torch.zeros(3, 4, 8, 2).transpose(2, 3)),
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
    query, angles = torch.randn(3, 4, 6, 8), make_angles(3, 4, 6, torch.float32)
    for rest in ((None, None, None), (*angles, None), (*angles, query)):
        torch.library.opcheck(torch.ops.cllm_kernels.append_kv_.default, (*make(), lengths, *rest, backend))
