"""`append_kv_` in Triton: one program writes some tokens of one cache head, keys and values, or rotates those of one query
head."""

from __future__ import annotations

import triton
import triton.language as tl

from . import configs
from .block_attention import _narrow

TOKENS = 16


@triton.jit
def _copy(
    cache, c0, c1, c2, new, n0, n1, n2, batch, head, row, token, fits, DIM: tl.constexpr, PAD: tl.constexpr
):  # fmt: skip
    dims = tl.arange(0, PAD)[None, :]
    mask = fits & (dims < DIM)
    values = tl.load(new + batch * n0 + head * n1 + token * n2 + dims, mask=mask)
    tl.store(cache + batch * c0 + head * c1 + row * c2 + dims, values, mask=mask)


@triton.jit
def _turned(x, other, c, s):
    straight = _narrow(x * c.to(tl.float32), c.dtype).to(tl.float32)
    crossed = _narrow(other * s.to(tl.float32), c.dtype).to(tl.float32)
    return _narrow(straight + crossed, c.dtype).to(tl.float32)


@triton.jit
def _rotate(
    cache, c0, c1, c2, key, k0, k1, k2, cos, a0, a1, sin, s0, s1, batch, head, row, token, fits,
    DIM: tl.constexpr, PAD: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = ROTARY // 2
    dims = tl.arange(0, PAD)[None, :]
    turned = fits & (dims < ROTARY)
    at = key + batch * k0 + head * k1 + token * k2
    stored = tl.load(at + dims, mask=fits & (dims < DIM))
    # the other half, a second read that the L1 cache serves
    other = tl.load(at + tl.where(dims < HALF, dims + HALF, dims - HALF), mask=turned, other=0.0).to(tl.float32)
    c = tl.load(cos + batch * a0 + token * a1 + dims, mask=turned, other=0.0)
    s = tl.load(sin + batch * s0 + token * s1 + dims, mask=turned, other=0.0)
    other = tl.where(dims < HALF, -other, other)
    values = tl.where(dims < ROTARY, _narrow(_turned(stored.to(tl.float32), other, c, s), stored.dtype), stored)
    tl.store(cache + batch * c0 + head * c1 + row * c2 + dims, values, mask=fits & (dims < DIM))


@triton.jit
def _rotate_query(
    query, q0, q1, q2, cos, a0, a1, sin, s0, s1, batch, head, token, inside, HALF: tl.constexpr, HALF_PAD: tl.constexpr
):  # fmt: skip
    """In place: a thread has both elements of a pair."""
    dims = tl.arange(0, HALF_PAD)[None, :]
    mask = inside & (dims < HALF)
    at = query + batch * q0 + token * q1 + head * q2 + dims
    cos += batch * a0 + token * a1 + dims
    sin += batch * s0 + token * s1 + dims
    first, second = tl.load(at, mask=mask).to(tl.float32), tl.load(at + HALF, mask=mask).to(tl.float32)
    new_first = _turned(first, -second, tl.load(cos, mask=mask), tl.load(sin, mask=mask))
    new_second = _turned(second, first, tl.load(cos + HALF, mask=mask), tl.load(sin + HALF, mask=mask))
    tl.store(at, _narrow(new_first, query.dtype.element_ty), mask=mask)
    tl.store(at + HALF, _narrow(new_second, query.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["width", "capacity", "kv_heads"])
def _append(
    key_cache, value_cache, key, value, cos, sin, query, lengths, kc0, kc1, kc2, vc0, vc1, vc2, k0, k1, k2, v0, v1, v2,
    a0, a1, s0, s1, q0, q1, q2, width, capacity, kv_heads,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAD: tl.constexpr, VALUE_PAD: tl.constexpr, TOKENS: tl.constexpr,
    ROTARY: tl.constexpr, HALF_PAD: tl.constexpr, QUERY: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    if QUERY:
        if head >= kv_heads:
            _rotate_query(
                query, q0, q1, q2, cos, a0, a1, sin, s0, s1, batch, head - kv_heads, token.to(tl.int64)[:, None],
                (token < width)[:, None], ROTARY // 2, HALF_PAD,
            )  # fmt: skip
            return
    row = tl.load(lengths + batch) + token
    # Lengths on a device are not checked by the host; what does not fit is not written.
    fits = ((token < width) & (row >= 0) & (row < capacity))[:, None]
    token, row = token.to(tl.int64)[:, None], row.to(tl.int64)[:, None]
    if ROTARY > 0:
        _rotate(
            key_cache, kc0, kc1, kc2, key, k0, k1, k2, cos, a0, a1, sin, s0, s1, batch, head, row, token, fits,
            DIM, PAD, ROTARY,
        )  # fmt: skip
    else:
        _copy(key_cache, kc0, kc1, kc2, key, k0, k1, k2, batch, head, row, token, fits, DIM, PAD)
    _copy(value_cache, vc0, vc1, vc2, value, v0, v1, v2, batch, head, row, token, fits, VALUE_DIM, VALUE_PAD)


def append_kv_(key_cache, value_cache, key, value, lengths, cos, sin, query) -> None:
    """The op on arguments that have been checked; see `cllm_kernels.ops.append_kv`."""
    batch, heads, width, dim = key.shape
    value_dim = value.size(3)
    if batch == 0 or width == 0:
        return
    rotary, turned_heads = 0, 0 if query is None else query.size(2)
    if cos is None:
        cos = sin = key  # not read
    else:
        rotary = cos.size(2)
    if query is None:
        query = key  # not read
    # Without fusion to multiply-adds, so that every product is rounded, as in PyTorch.
    _append[(triton.cdiv(width, TOKENS), heads + turned_heads, batch)](
        key_cache, value_cache, key, value, cos, sin, query, lengths,
        *key_cache.stride()[:3], *value_cache.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *cos.stride()[:2], *sin.stride()[:2], *query.stride()[:3], width, key_cache.size(2), heads,
        DIM=dim, VALUE_DIM=value_dim, PAD=configs.next_power(dim), VALUE_PAD=configs.next_power(value_dim),
        TOKENS=TOKENS, ROTARY=rotary, HALF_PAD=configs.next_power(max(1, rotary // 2)), QUERY=turned_heads > 0,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
