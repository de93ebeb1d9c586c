"""`rms_norm` and `add_rms_norm` in Triton: one program for each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .block_attention import _narrow


@triton.jit
def _rms_norm(x, delta, weight, total, out, size, eps, ADD: tl.constexpr, PAD: tl.constexpr):
    dim = tl.arange(0, PAD)
    inside = dim < size
    at = tl.program_id(0).to(tl.int64) * size + dim
    dtype: tl.constexpr = out.dtype.element_ty
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        rounded = _narrow(values, dtype)
        tl.store(total + at, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / size + eps)
    # Rounded before it is multiplied by the weight, as transformers does.
    normed = _narrow(values * scale, dtype).to(tl.float32)
    by = tl.load(weight + dim, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, _narrow(normed * by, dtype), mask=inside)


def rms_norm(x, delta, weight, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, x itself where delta is None, and its norm. On arguments that have been checked and are contiguous; see
    `cllm_kernels.ops.rms_norm`."""
    size = x.size(-1)
    out = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    if x.numel():
        pad = configs.next_power(size)
        _rms_norm[(x.numel() // size,)](
            x, x if delta is None else delta, weight, total, out, size, eps,
            ADD=delta is not None, PAD=pad, num_warps=configs.norm_warps(pad),
        )  # fmt: skip
    return total, out
