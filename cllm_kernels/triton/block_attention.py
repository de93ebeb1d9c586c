"""`block_attention` in Triton: one program for each row tile, cache head and split of the keys, and a merge.

Rows are token x head of the group that shares a cache head, so that a group of any size fills a tile:
row = token * group + member. Scores and their maxima are in base 2. The online softmax and the split along the
cache follow FlashAttention (Dao et al., 2022, arXiv:2205.14135) and Flash-Decoding (Dao et al., 2023).

The partial results live in memory of torch's caching allocator, which is asked anew by each call, and so do the keys of
`converge_` and `lm_head_argmax`. A workspace of our own would save no device memory and no call of the driver: the
allocator hands out the same blocks from the second call on, ordered by stream, and a CUDA graph gets its blocks from a
pool that lives as long as the graph, and in which all layers share one block, as each call frees it before the next.
Sizes depend on shapes alone, so that a replay needs no others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# Triton's interpreter multiplies the bits of bfloat16 as integers, and cuts where the hardware rounds.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, sum):
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)  # the same products
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """float32 to a storage type, rounded to nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x != x, x, rounded.to(tl.float32, bitcast=True))
    return x.to(dtype)


@triton.jit
def _broken(x):
    x = x.to(tl.float32)
    return (tl.abs(x) == float("inf")) | (x != x)


@triton.jit
def _step(
    query, key_rows, value_rows, key_stride, value_stride, first, end, length, lowest, highest, own, peak, total, output,
    scale, cap,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAD: tl.constexpr, VALUE_PAD: tl.constexpr, KEYS: tl.constexpr,
    MASK: tl.constexpr, BRANCHED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys [first, first + KEYS); with MASK, over those before `end` that a row sees.

    These are the ones from `lowest` to `highest`; if BRANCHED, those from `length` on that are before `own` are not.
    """
    keys = first + tl.arange(0, KEYS)
    dims = tl.arange(0, PAD)
    value_dims = tl.arange(0, VALUE_PAD)
    key_at = key_rows + keys[None, :].to(tl.int64) * key_stride + dims[:, None]
    value_at = value_rows + keys[:, None].to(tl.int64) * value_stride + value_dims[None, :]
    if MASK:
        key = tl.load(key_at, mask=(keys < end)[None, :] & (dims < DIM)[:, None], other=0.0)
        value = tl.load(value_at, mask=(keys < end)[:, None] & (value_dims < VALUE_DIM)[None, :], other=0.0)
    else:
        if PAD == DIM:
            key = tl.load(key_at)
        else:
            key = tl.load(key_at, mask=(dims < DIM)[:, None], other=0.0)
        if VALUE_PAD == VALUE_DIM:
            value = tl.load(value_at)
        else:
            value = tl.load(value_at, mask=(value_dims < VALUE_DIM)[None, :], other=0.0)
    scores = _dot(query, key, tl.zeros([query.shape[0], KEYS], tl.float32)) * scale
    if SOFTCAP:
        # `cap` is in base 2 as well; tanh(x) = sign(x) (1 - e^-2|x|) / (1 + e^-2|x|) does not overflow
        ratio = scores / cap
        decay = tl.exp2(tl.abs(ratio) * (-2.0 * LOG2E))
        tanh = (1.0 - decay) / (1.0 + decay)
        scores = cap * tl.where(ratio < 0, -tanh, tanh)
    if MASK:
        visible = (keys[None, :] >= lowest[:, None]) & (keys[None, :] <= highest[:, None]) & (keys < end)[None, :]
        if BRANCHED:
            visible = visible & ((keys < length)[None, :] | (keys[None, :] >= own[:, None]))
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # a row that has seen nothing keeps weights of 0, as 2^(-inf - 0)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - shift[:, None])
    correction = tl.exp2(peak - shift)
    total = total * correction + tl.sum(weights, 1)
    output = output * correction[:, None]
    if MASK:
        # A weight of 0 does not remove a value that is not finite, so these are taken out, and what sees them is NaN.
        broken = _broken(value)
        if tl.max(tl.max(broken.to(tl.int32), 1), 0) > 0:
            value = tl.where(broken, 0.0, value)
            for at in range(first, tl.minimum(first + KEYS, end)):
                row_at = value_rows + (tl.zeros([1], tl.int64) + at) * value_stride
                one = tl.load(row_at + value_dims, mask=value_dims < VALUE_DIM, other=0.0)
                sees = (at >= lowest) & (at <= highest)
                if BRANCHED:
                    sees = sees & ((at < length) | (at >= own))
                output = tl.where(sees[:, None] & _broken(one)[None, :], float("nan"), output)
    output = _dot(_narrow(weights, value.dtype), value, output)
    return new_peak, total, output


@triton.jit(do_not_specialize=["rows", "width", "branch", "window", "min_keys"])
def _attend(
    query, key_cache, value_cache, lengths, starts, sinks, out, lse, partial_out, partial_lse,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, rows, width, branch, kv_heads, window, min_keys, scale, cap,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAD: tl.constexpr, VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, MASKED_KEYS: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr,
    BRANCHED: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    head, batch = tl.program_id(1), tl.program_id(2)
    length, start = tl.load(lengths + batch), tl.load(starts + batch)

    # Rows behind the last repeat it and are not written.
    row = tile * ROWS + tl.arange(0, ROWS)
    real = tl.minimum(row, rows - 1)
    token = real // GROUP
    query_head = head * GROUP + real % GROUP
    highest = length + token
    lowest = tl.zeros_like(token) + start
    own = lowest
    inside = token
    if BRANCHED:
        inside = token % branch
        own = highest - inside
        if WINDOWED:
            own += tl.maximum(0, inside - window + 1)
    if WINDOWED:
        lowest = tl.maximum(lowest, length + inside - window + 1)

    # What any row of the tile sees is [begin, end), what all see [all_begin, all_end). Of one chain, positions rise with
    # the rows; with branches all rows share what is before the window.
    first_token = tile * ROWS // GROUP
    last_token = tl.minimum(tile * ROWS + ROWS - 1, rows - 1) // GROUP
    end, all_end = length + last_token + 1, length + first_token + 1
    if BRANCHED:
        first_token, last_token, all_end = 0, branch - 1, length
    begin, all_begin = start, start
    if WINDOWED:
        begin = tl.maximum(start, length + first_token - window + 1)
        all_begin = tl.maximum(start, length + last_token - window + 1)
    begin = tl.minimum(begin, end)
    if SPLITS > 1:
        size = tl.maximum(min_keys, tl.cdiv(end - begin, SPLITS))
        size = tl.cdiv(size, KEYS) * KEYS
        begin = tl.minimum(begin + split * size, end)
        end = tl.minimum(begin + size, end)
    all_begin = tl.minimum(tl.maximum(begin, all_begin), end)
    all_end = tl.maximum(tl.minimum(end, all_end), all_begin)
    masked_end = all_begin
    if WINDOWED:  # whole steps, so that the unmasked loop begins where the masked one ends
        masked_end = begin + tl.cdiv(all_begin - begin, MASKED_KEYS) * MASKED_KEYS
    whole_end = masked_end + tl.maximum(0, all_end - masked_end) // KEYS * KEYS

    slot = ((batch * kv_heads + head).to(tl.int64) * SPLITS + split) * rows + row
    if SPLITS > 1:
        if begin >= end:  # an empty split
            tl.store(partial_lse + slot, float("-inf"), mask=row < rows)
            return

    dims = tl.arange(0, PAD)
    value_dims = tl.arange(0, VALUE_PAD)
    query_at = query + batch.to(tl.int64) * q0 + token[:, None].to(tl.int64) * q1 + query_head[:, None].to(tl.int64) * q2
    tile_query = tl.load(query_at + dims[None, :], mask=(dims < DIM)[None, :], other=0.0)
    key_rows = key_cache + batch.to(tl.int64) * k0 + head.to(tl.int64) * k1
    value_rows = value_cache + batch.to(tl.int64) * v0 + head.to(tl.int64) * v1
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    if WINDOWED:
        for first in range(begin, masked_end, MASKED_KEYS):
            peak, total, output = _step(
                tile_query, key_rows, value_rows, k2, v2, first, end, length, lowest, highest, own, peak, total,
                output, scale, cap,
                DIM, VALUE_DIM, PAD, VALUE_PAD, MASKED_KEYS, True, BRANCHED, SOFTCAP,
            )  # fmt: skip
    for first in range(masked_end, whole_end, KEYS):
        peak, total, output = _step(
            tile_query, key_rows, value_rows, k2, v2, first, end, length, lowest, highest, own, peak, total,
            output, scale, cap,
            DIM, VALUE_DIM, PAD, VALUE_PAD, KEYS, False, BRANCHED, SOFTCAP,
        )  # fmt: skip
    for first in range(whole_end, end, MASKED_KEYS):
        peak, total, output = _step(
            tile_query, key_rows, value_rows, k2, v2, first, end, length, lowest, highest, own, peak, total,
            output, scale, cap,
            DIM, VALUE_DIM, PAD, VALUE_PAD, MASKED_KEYS, True, BRANCHED, SOFTCAP,
        )  # fmt: skip

    if SPLITS > 1:
        tl.store(partial_lse + slot, peak + tl.log2(total), mask=row < rows)
        output = output / tl.where(total == 0, 1.0, total)[:, None]
        at = partial_out + slot[:, None] * VALUE_DIM + value_dims[None, :]
        tl.store(at, output, mask=(row < rows)[:, None] & (value_dims < VALUE_DIM)[None, :])
    else:
        if SINKS:
            sink = tl.load(sinks + query_head) * LOG2E
            top = tl.maximum(peak, sink)
            shift = tl.where(top == float("-inf"), 0.0, top)
            output = output * tl.exp2(peak - shift)[:, None]
            total = total * tl.exp2(peak - shift) + tl.exp2(sink - shift)
            peak = top
        output = output / tl.where(total == 0, 1.0, total)[:, None]
        at = ((batch.to(tl.int64) * width + token) * kv_heads * GROUP + query_head)[:, None] * VALUE_DIM
        stored = (row < rows)[:, None] & (value_dims < VALUE_DIM)[None, :]
        tl.store(out + at + value_dims[None, :], _narrow(output, out.dtype.element_ty), mask=stored)
        at = (batch.to(tl.int64) * kv_heads * GROUP + query_head) * width + token
        tl.store(lse + at, (peak + tl.log2(total)) * LN2, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "width"])
def _merge(
    partial_out, partial_lse, sinks, out, lse, rows, width, kv_heads,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """Joins the splits of some rows, weighted by their sums; empty ones are not read."""
    head, batch = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    splits = tl.arange(0, SPLITS)
    value_dims = tl.arange(0, VALUE_PAD)
    slot = ((batch * kv_heads + head).to(tl.int64) * SPLITS + splits)[None, :] * rows + row[:, None]
    sums = tl.load(partial_lse + slot, mask=(row < rows)[:, None], other=float("-inf"))
    query_head = head * GROUP + row % GROUP
    top = tl.max(sums, 1)
    if SINKS:
        sink = tl.load(sinks + query_head) * LOG2E
        top = tl.maximum(top, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(sums - shift[:, None])
    total = tl.sum(weights, 1)
    if SINKS:
        total += tl.exp2(sink - shift)
    filled = (sums != float("-inf"))[:, :, None] & (value_dims < VALUE_DIM)[None, None, :]
    parts = tl.load(partial_out + slot[:, :, None] * VALUE_DIM + value_dims[None, None, :], mask=filled, other=0.0)
    merged = tl.sum(parts * weights[:, :, None], 1) / tl.where(total == 0, 1.0, total)[:, None]
    token = row // GROUP
    at = ((batch.to(tl.int64) * width + token) * kv_heads * GROUP + query_head)[:, None] * VALUE_DIM + value_dims[None, :]
    stored = (row < rows)[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(out + at, _narrow(merged, out.dtype.element_ty), mask=stored)
    at = (batch.to(tl.int64) * kv_heads * GROUP + query_head) * width + token
    tl.store(lse + at, (shift + tl.log2(total)) * LN2, mask=row < rows)


def block_attention(
    query, key_cache, value_cache, lengths, starts, scale, sliding_window, softcap, sinks, branch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op on arguments that have been checked; see `cllm_kernels.ops.block_attention`."""
    batch, width, heads, dim = query.shape
    kv_heads, capacity, value_dim = key_cache.size(1), key_cache.size(2), value_cache.size(3)
    if max(dim, value_dim) > configs.MAX_HEAD_DIM:
        raise ValueError(
            f"heads have {dim} and {value_dim} dimensions; backend 'triton' supports up to {configs.MAX_HEAD_DIM}"
        )
    group = heads // kv_heads
    rows = width * group
    out = query.new_empty(batch, width, heads, value_dim)
    lse = query.new_empty(batch, heads, width, dtype=torch.float32)
    if batch == 0:
        return out, lse
    config = configs.attention_config(dim, value_dim, query.dtype, rows)
    splits = configs.splits(capacity, width, config.block_rows)
    partial_out = partial_lse = lse
    if splits > 1:
        partial_out = query.new_empty(batch * kv_heads * splits * rows, value_dim, dtype=torch.float32)
        partial_lse = query.new_empty(batch * kv_heads * splits * rows, dtype=torch.float32)
    pads = configs.padded_dim(dim), configs.padded_dim(value_dim)
    no_sinks = sinks is None
    sinks = lse if no_sinks else sinks
    _attend[(-(-rows // config.block_rows) * splits, kv_heads, batch)](
        query, key_cache, value_cache, lengths, starts, sinks, out, lse, partial_out, partial_lse,
        *query.stride()[:3], *key_cache.stride()[:3], *value_cache.stride()[:3],
        rows, width, branch, kv_heads, sliding_window, configs.split_keys(config.block_rows),
        (dim**-0.5 if scale is None else scale) * LOG2E.value, softcap * LOG2E.value,
        GROUP=group, DIM=dim, VALUE_DIM=value_dim, PAD=pads[0], VALUE_PAD=pads[1],
        ROWS=config.block_rows, KEYS=config.block_keys, MASKED_KEYS=configs.masked_keys(config), SPLITS=splits,
        WINDOWED=sliding_window > 0, BRANCHED=branch < width, SOFTCAP=softcap > 0, SINKS=not no_sinks,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        merge_rows = configs.merge_rows(splits, pads[1], rows)
        _merge[(triton.cdiv(rows, merge_rows), kv_heads, batch)](
            partial_out, partial_lse, sinks, out, lse, rows, width, kv_heads,
            GROUP=group, VALUE_DIM=value_dim, VALUE_PAD=pads[1], ROWS=merge_rows, SPLITS=splits,
            SINKS=not no_sinks, num_warps=4,
        )  # fmt: skip
    return out, lse
