"""Attention of a window of queries against a preallocated cache with per-row lengths."""

from __future__ import annotations

import math

import torch

from .. import backends
from ._library import (
    DTYPE_CODES,
    FLOAT_DTYPES,
    check_device,
    check_float,
    check_last_dim,
    check_rank,
    check_rows,
    check_same,
    check_shape,
    register,
)
from ._tickets import tickets
from .append_kv import check_room

# The reference computes scores for as many queries at a time as give at most this many of them (256 MiB).
REFERENCE_SCORES = 1 << 26


def block_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    scale: float | None = None,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    branch: int = 0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of window queries, whose own keys and values already stand in the cache.

    query [B, n, Hq, D]; key_cache [B, Hkv, S, D] and value_cache [B, Hkv, S, Dv], all of one dtype (float32,
    bfloat16, float16) with a contiguous last dimension and otherwise free strides. Hq is a multiple of Hkv;
    query head h reads cache head h // (Hq / Hkv).
    lengths int32 [B]: cache rows that were valid before this window; its own stand at [L, L + n).
    starts int32 [B]: first valid cache row of each batch row (left padding).

    Query i of row b stands at position p = L_b + i and sees the cache rows j with starts_b <= j <= p, and
    if `sliding_window` is W > 0 also j > p - W:

        cache row:    0 .. start-1 | start .. L-1 | L  L+1  L+2  L+3 | ..
        query 0           .              x           x    .    .    .
        query 1           .              x           x    x    .    .
        query 2           .              x           x    x    x    .
        query 3           .              x           x    x    x    x

    branch: with m > 0, a divisor of n, the window is n / m branches of m queries each, that go on in different ways
    from the same L rows: query i stands at position L_b + i % m, and of the window's own rows it sees those of its
    branch alone, which stand at the positions of their queries. With n = 4 and m = 2:

        cache row:    0 .. start-1 | start .. L-1 | L  L+1  L+2  L+3 | ..
        position                                    L  L+1  L    L+1
        query 0           .              x           x    .    .    .
        query 1           .              x           x    x    .    .
        query 2           .              x           .    .    x    .
        query 3           .              x           .    .    x    x

    scale: factor of the scores; None means 1 / sqrt(D).
    softcap: c > 0 replaces each score s by c * tanh(s / c), before masking.
    sinks [Hq]: a further logit of each head that takes part in the softmax's sum and has no value.

    Returns out [B, n, Hq, Dv] in the query's dtype, contiguous, and lse float32 [B, Hq, n], the natural
    logarithm of the softmax's sum with the sink in it. A query that sees nothing gives 0 and -inf (or the
    sink). Sums are accumulated in float32 for every dtype, with the softmax's weights in the query's dtype on tensor
    cores and, in bfloat16 with D a multiple of 32 and Dv one of 16, by the CPU's AVX-512 BF16 and AMX. Rows that a
    query does not see have no influence on its result, not even as NaN; a non-finite value that it sees makes its
    output non-finite. Nothing is mutated. For inference: gradients are not defined.

    Raises ValueError on shapes, dtypes, devices, strides or numbers that do not fit; on the CPU also when a
    row has L < 0, L + n > S or a negative start. On other devices rows are not checked, because that would
    make the host wait for them.

    The online softmax and the split along the cache follow FlashAttention (Dao et al., 2022,
    arXiv:2205.14135) and Flash-Decoding (Dao et al., 2023).
    """
    return _call(
        query, key_cache, value_cache, lengths, starts, scale, sliding_window, softcap, sinks, branch, backend
    )


def _fits(query, key_cache, value_cache, lengths, starts, sliding_window, softcap, sinks, branch) -> bool:
    """Whether `_check` would pass, for the arguments of every layer of every forward; False leaves it open."""
    shape, keys, values = query.shape, key_cache.shape, value_cache.shape
    if sinks is not None or not len(shape) == len(keys) == len(values) == 4:
        return False
    batch, width, heads, dim = shape
    key_batch, kv_heads, capacity, key_dim = keys
    dtype, device = query.dtype, query.device
    return (
        batch == key_batch == values[0]
        and kv_heads == values[1]
        and capacity == values[2]
        and dim == key_dim
        and 1 <= width <= capacity
        and dim >= 1 <= heads
        and kv_heads >= 1
        and heads % kv_heads == 0
        and dtype in FLOAT_DTYPES
        and dtype == key_cache.dtype == value_cache.dtype
        and query.stride(3) == key_cache.stride(3) == value_cache.stride(3) == 1
        and lengths.shape == starts.shape == (batch,)
        and lengths.dtype == starts.dtype == torch.int32
        and device == key_cache.device == value_cache.device == lengths.device == starts.device
        and sliding_window >= 0
        and 0 <= softcap < math.inf
        and branch >= 0
        and width % (branch or width) == 0
    )


def _check(query, key_cache, value_cache, lengths, starts, sliding_window, softcap, sinks, branch) -> None:
    if _fits(query, key_cache, value_cache, lengths, starts, sliding_window, softcap, sinks, branch):
        return
    check_rank("query", query, "B, n, Hq, D")
    check_rank("key_cache", key_cache, "B, Hkv, S, D")
    check_rank("value_cache", value_cache, "B, Hkv, S, Dv")
    batch, width, heads, dim = query.shape
    kv_heads, capacity = key_cache.size(1), key_cache.size(2)
    check_shape("key_cache", key_cache, (batch, kv_heads, capacity, dim))
    check_shape("value_cache", value_cache, (batch, kv_heads, capacity, value_cache.size(3)))
    if width < 1 or dim < 1 or kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ValueError(
            f"query has n = {width}, Hq = {heads}, D = {dim} and the cache Hkv = {kv_heads}; "
            "n and D must be at least 1 and Hq a multiple of Hkv"
        )
    check_float("query", query)
    check_last_dim("query", query)
    for name, tensor in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_same(name, tensor, "query", query)
        check_last_dim(name, tensor)
    check_rows("lengths", lengths, batch, "query", query)
    check_rows("starts", starts, batch, "query", query)
    if width > capacity:
        raise ValueError(f"the window has n = {width} rows; the cache has room for S = {capacity}")
    if sliding_window < 0:
        raise ValueError(f"sliding_window is {sliding_window}; it must be at least 0, which means none")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; it must be finite and at least 0, which means none")
    if branch < 0 or width % (branch or width):
        raise ValueError(f"branch is {branch}; it must be 0 (none) or divide the n = {width} queries of the window")
    if sinks is not None:
        check_float("sinks", sinks)
        check_shape("sinks", sinks, (heads,))
        check_device("sinks", sinks, "query", query)


def _check_starts(starts: torch.Tensor) -> None:
    if starts.device.type != "cpu":
        return
    for row, start in enumerate(starts.tolist()):
        if start < 0:
            raise ValueError(f"row {row} has start {start}; it must be at least 0")


def visible_rows(
    lengths: torch.Tensor, starts: torch.Tensor, queries: torch.Tensor, capacity: int, branch: int, sliding_window: int = 0
) -> torch.Tensor:
    """Which cache rows the given queries of a window see: bool [B, len(queries), capacity]."""
    columns = torch.arange(capacity, device=queries.device)
    lengths = lengths[:, None, None]
    inside = (queries % branch)[:, None]
    first = lengths + queries[:, None] - inside  # of the query's branch
    before = columns < lengths
    seen = (before | (columns >= first)) & (columns <= first + inside) & (columns >= starts[:, None, None])
    if sliding_window:
        positions = torch.where(before, columns, lengths + columns - first)
        seen &= positions > lengths + inside - sliding_window
    return seen


def reference(
    query, key_cache, value_cache, lengths, starts, scale=None, sliding_window=0, softcap=0.0, sinks=None, branch=0,
    dtype=torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The specification of `block_attention`, computed in `dtype`; out and lse are returned in `dtype`."""
    batch, width, heads, dim = query.shape
    kv_heads, capacity = key_cache.size(1), key_cache.size(2)
    group = heads // kv_heads
    scale = dim**-0.5 if scale is None else scale
    check_room(lengths, width, capacity)
    _check_starts(starts)

    keys, values = key_cache.to(dtype), value_cache.to(dtype)
    # What is not finite is left out of the product, since 0 * NaN is NaN, and accounted for on its own.
    finite = values.isfinite()
    values = torch.where(finite, values, 0)
    broken = (~finite).to(torch.float32)
    out = query.new_empty(batch, width, heads, value_cache.size(3), dtype=dtype)
    lse = query.new_empty(batch, heads, width, dtype=dtype)

    step = max(1, REFERENCE_SCORES // max(1, batch * heads * capacity))
    for first in range(0, width, step):
        last = min(first + step, width)
        # [B, Hkv, group, i, D]
        q = query[:, first:last].to(dtype).unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)
        queries = torch.arange(first, last, device=query.device)
        visible = visible_rows(lengths, starts, queries, capacity, branch or width, sliding_window)
        scores = torch.einsum("bhgid,bhjd->bhgij", q, keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible[:, None, None], -math.inf)
        peak = scores.amax(-1)
        if sinks is not None:
            sink = sinks.to(dtype).view(kv_heads, group, 1)
            peak = torch.maximum(peak, sink)
        peak = peak.masked_fill(peak == -math.inf, 0)  # nothing to see: exp(-inf - 0) = 0
        weights = torch.exp(scores - peak[..., None])
        total = weights.sum(-1)
        if sinks is not None:
            total = total + torch.exp(sink - peak)

        part = torch.einsum("bhgij,bhjd->bhgid", weights, values) / total.masked_fill(total == 0, 1)[..., None]
        seen = torch.einsum("bij,bhjd->bhid", visible.to(torch.float32), broken) > 0
        part = part.masked_fill(seen[:, :, None], math.nan)
        out[:, first:last] = part.permute(0, 3, 1, 2, 4).flatten(2, 3)
        lse[:, :, first:last] = (peak + torch.log(total)).flatten(1, 2)
    return out, lse


def _implementation(
    query, key_cache, value_cache, lengths, starts, scale=None, sliding_window=0, softcap=0.0, sinks=None, branch=0,
    backend="auto",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    _check(query, key_cache, value_cache, lengths, starts, sliding_window, softcap, sinks, branch)
    dim, value_dim = query.size(3), value_cache.size(3)
    cell = None
    if backend == "auto" and query.is_cuda:
        rows = query.size(1) * (query.size(2) // key_cache.size(1))
        cell = backends.attention_cell(max(dim, value_dim), rows, key_cache.size(2))
    backend = backends.resolve(backend, query.device, cuda_refusal(query.dtype, dim, value_dim), cell=cell)
    if backend == "torch":
        out, lse = reference(
            query, key_cache, value_cache, lengths, starts, scale, sliding_window, softcap, sinks, branch
        )
        return out.to(query.dtype), lse
    batch, width, heads, _ = query.shape
    branch = branch or width
    kv_heads, capacity = key_cache.size(1), key_cache.size(2)
    lengths, starts = lengths.contiguous(), starts.contiguous()
    if sinks is not None:
        sinks = sinks.to(torch.float32).contiguous()
    if backend == "triton":
        from ..triton.block_attention import block_attention as run

        check_room(lengths, width, capacity)
        _check_starts(starts)
        with torch.cuda.device_of(query):  # Triton launches on the current device
            return run(query, key_cache, value_cache, lengths, starts, scale, sliding_window, softcap, sinks, branch)
    out = query.new_empty(batch, width, heads, value_dim)
    lse = torch.empty(batch, heads, width, dtype=torch.float32, device=query.device)
    arguments = (
        query.data_ptr(), *query.stride()[:3],
        key_cache.data_ptr(), *key_cache.stride()[:3],
        value_cache.data_ptr(), *value_cache.stride()[:3],
        lengths.data_ptr(), starts.data_ptr(), 0 if sinks is None else sinks.data_ptr(),
        out.data_ptr(), lse.data_ptr(),
        batch, width, heads, kv_heads, capacity, dim, value_dim,
        dim**-0.5 if scale is None else scale, sliding_window, branch, softcap, DTYPE_CODES[query.dtype],
    )  # fmt: skip
    if backend == "cpp":
        backends.EXTENSION.block_attention(*arguments, torch.get_num_threads())
        return out, lse
    check_room(lengths, width, capacity)
    _check_starts(starts)
    floats, count = backends.CUDA.attention_workspace(batch, width, heads, kv_heads, capacity, dim, value_dim)
    partial = query.new_empty(floats, dtype=torch.float32) if floats else None
    backends.CUDA.block_attention(
        *arguments, 0 if partial is None else partial.data_ptr(), tickets(query.device, count) if count else 0,
        *backends.cuda_stream(query.device),
    )  # fmt: skip
    return out, lse


def cuda_refusal(dtype: torch.dtype, dim: int = 1, value_dim: int = 1) -> str | None:
    """Why backend "cuda" cannot take a call, or None: its tensor cores have no float32, and heads may be too large."""
    if backends.CUDA is None:
        return None
    if dtype == torch.float32:
        return "the tensors are float32; block_attention takes bfloat16 and float16 there"
    largest = backends.CUDA.LARGEST_HEAD_DIM
    if max(dim, value_dim) > largest:
        return f"heads have {dim} and {value_dim} dimensions; block_attention takes up to {largest} there"
    return None


def _fake(
    query, key_cache, value_cache, lengths, starts, scale=None, sliding_window=0, softcap=0.0, sinks=None, branch=0,
    backend="auto",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    _check(query, key_cache, value_cache, lengths, starts, sliding_window, softcap, sinks, branch)
    batch, width, heads, _ = query.shape
    out = query.new_empty(batch, width, heads, value_cache.size(3))
    return out, query.new_empty(batch, heads, width, dtype=torch.float32)


_call = register(
    "block_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths, Tensor starts, "
    "float? scale=None, int sliding_window=0, float softcap=0.0, Tensor? sinks=None, int branch=0, "
    'str backend="auto") -> (Tensor, Tensor)',
    _implementation,
    _fake,
)
