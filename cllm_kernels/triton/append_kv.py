"""`append_kv_` in Triton: one program copies some tokens of one cache head, keys and values."""

from __future__ import annotations

import triton
import triton.language as tl

from . import configs

TOKENS = 16


@triton.jit
def _copy(
    cache, c0, c1, c2, new, n0, n1, n2, batch, head, row, token, fits, DIM: tl.constexpr, PAD: tl.constexpr
):  # fmt: skip
    dims = tl.arange(0, PAD)[None, :]
    mask = fits & (dims < DIM)
    values = tl.load(new + batch * n0 + head * n1 + token * n2 + dims, mask=mask)
    tl.store(cache + batch * c0 + head * c1 + row * c2 + dims, values, mask=mask)


@triton.jit(do_not_specialize=["width", "capacity"])
def _append(
    key_cache, value_cache, key, value, lengths, kc0, kc1, kc2, vc0, vc1, vc2, k0, k1, k2, v0, v1, v2, width, capacity,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAD: tl.constexpr, VALUE_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.load(lengths + batch) + token
    # Lengths on a device are not checked by the host; what does not fit is not written.
    fits = ((token < width) & (row >= 0) & (row < capacity))[:, None]
    token, row = token.to(tl.int64)[:, None], row.to(tl.int64)[:, None]
    _copy(key_cache, kc0, kc1, kc2, key, k0, k1, k2, batch, head, row, token, fits, DIM, PAD)
    _copy(value_cache, vc0, vc1, vc2, value, v0, v1, v2, batch, head, row, token, fits, VALUE_DIM, VALUE_PAD)


def append_kv_(key_cache, value_cache, key, value, lengths) -> None:
    """The op on arguments that have been checked; see `cllm_kernels.ops.append_kv`."""
    batch, heads, width, dim = key.shape
    value_dim = value.size(3)
    if batch == 0 or width == 0:
        return
    _append[(triton.cdiv(width, TOKENS), heads, batch)](
        key_cache, value_cache, key, value, lengths,
        *key_cache.stride()[:3], *value_cache.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        width, key_cache.size(2),
        DIM=dim, VALUE_DIM=value_dim, PAD=configs.next_power(dim), VALUE_PAD=configs.next_power(value_dim),
        TOKENS=TOKENS, num_warps=4,
    )  # fmt: skip
