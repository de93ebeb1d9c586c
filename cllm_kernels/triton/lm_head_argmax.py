"""`lm_head_argmax` in Triton: a launch for the largest logit of each tile of the vocabulary, and one to join these.

One program multiplies some rows of the weight with the hidden states of all tokens (up to 128, in float32 up to 64), so
that weights are read once. The vocabulary is the product's first dimension, which tensor cores want large, and the few
tokens are the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import configs
from .block_attention import _INTERPRETED, _dot, _narrow

_LOWEST = tl.constexpr(-0x80000000)  # below the ordered bits of any number
_NAN = tl.constexpr(0x7FFFFFFF)  # above them
_BEHIND = tl.constexpr(0x7FFFFFFF)  # above any index

# Tiles that the second launch takes at a time.
JOINED = 1024


@triton.jit
def _tanh(x):
    if _INTERPRETED:  # which has no libdevice
        x = x.to(tl.float64)
        decay = tl.exp(-2.0 * tl.abs(x))
        size = (1.0 - decay) / (1.0 + decay)
        return tl.where(x < 0, -size, size).to(tl.float32)
    return libdevice.tanh(x)


@triton.jit
def _over_cap(x, cap):
    """x / cap as PyTorch computes it: on a GPU, by the reciprocal."""
    if _INTERPRETED:
        return x / cap
    return x * tl.div_rn(1.0, cap)


@triton.jit
def _ordered(logits):
    """int32 that are ordered as the numbers; NaN is above all."""
    logits = tl.where(logits == 0, 0.0, logits)  # -0 equals 0
    bits = logits.to(tl.int32, bitcast=True)
    return tl.where(logits != logits, _NAN, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit(do_not_specialize=["tokens", "width"])
def _argmax(
    hidden, weight, bias, keys, h0, h1, weight_stride, bias_stride, tokens, width, vocabulary, size, scale, cap,
    VOCABULARY: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share weights, where there are more tokens than a tile holds.
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    index = tl.program_id(1) * VOCABULARY + tl.arange(0, VOCABULARY)
    # What is behind the last token or weight repeats it: the one is not stored, the other loses.
    real_token, real_index = tl.minimum(token, tokens - 1), tl.minimum(index, vocabulary - 1)
    depth = tl.arange(0, DEPTH)
    hidden_at = hidden + (real_token // width).to(tl.int64) * h0 + (real_token % width).to(tl.int64) * h1
    hidden_at = hidden_at[None, :] + depth[:, None]
    weight_at = weight + real_index.to(tl.int64)[:, None] * weight_stride + depth[None, :]
    logits = tl.zeros([VOCABULARY, TOKENS], tl.float32)
    for first in range(0, size, DEPTH):
        inside = first + depth < size
        rows = tl.load(weight_at + first, mask=inside[None, :], other=0.0)
        columns = tl.load(hidden_at + first, mask=inside[:, None], other=0.0)
        logits = _dot(rows, columns, logits)

    dtype: tl.constexpr = hidden.dtype.element_ty
    if BIAS:
        logits += tl.load(bias + real_index.to(tl.int64) * bias_stride).to(tl.float32)[:, None]
    logits = _narrow(logits, dtype).to(tl.float32)
    if SCALE:
        logits = _narrow(logits * scale, dtype).to(tl.float32)
    if SOFTCAP:
        logits = _narrow(_over_cap(logits, cap), dtype).to(tl.float32)
        logits = _narrow(_tanh(logits), dtype).to(tl.float32)
        logits = _narrow(logits * cap, dtype).to(tl.float32)
    ordered = tl.where((index < vocabulary)[:, None], _ordered(logits), _LOWEST)
    top = tl.max(ordered, 0)
    where = tl.min(tl.where(ordered == top[None, :], index[:, None], _BEHIND), 0)
    key = (top.to(tl.int64) << 32) | (0x7FFFFFFF - where).to(tl.int64)
    tl.store(keys + token.to(tl.int64) * tl.num_programs(1) + tl.program_id(1), key, mask=token < tokens)


@triton.jit(do_not_specialize=["tiles"])
def _join(keys, indices, values, tiles, JOINED: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, JOINED)
    best = tl.full([JOINED], -0x8000000000000000, tl.int64)
    for first in range(0, tiles, JOINED):
        tile = first + offsets
        best = tl.maximum(best, tl.load(keys + token * tiles + tile, mask=tile < tiles, other=-0x8000000000000000))
    key = tl.max(best, 0)
    ordered = (key >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    tl.store(values + token, bits.to(tl.float32, bitcast=True))
    tl.store(indices + token, 0x7FFFFFFF - (key & 0x7FFFFFFF))


def lm_head_argmax(hidden, weight, bias, scale, softcap) -> tuple[torch.Tensor, torch.Tensor]:
    """The op on arguments that have been checked; see `cllm_kernels.ops.lm_head_argmax`."""
    batch, width, size = hidden.shape
    vocabulary, tokens = weight.size(0), batch * width
    indices = hidden.new_empty(batch, width, dtype=torch.int64)
    values = hidden.new_empty(batch, width, dtype=torch.float32)
    if tokens == 0:
        return indices, values
    config = configs.lm_head_config(hidden.dtype, tokens)
    tiles = triton.cdiv(vocabulary, config.block_vocabulary)
    keys = hidden.new_empty(tokens * tiles, dtype=torch.int64)
    _argmax[(triton.cdiv(tokens, config.block_tokens), tiles)](
        hidden, weight, weight if bias is None else bias, keys,
        hidden.stride(0), hidden.stride(1), weight.stride(0), 0 if bias is None else bias.stride(0),
        tokens, width, vocabulary, size, float(scale), float(softcap),
        VOCABULARY=config.block_vocabulary, TOKENS=config.block_tokens, DEPTH=config.block_depth,
        BIAS=bias is not None, SCALE=scale != 1.0, SOFTCAP=softcap > 0,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    _join[(tokens,)](keys, indices, values, tiles, JOINED=JOINED, num_warps=4)
    return indices, values
