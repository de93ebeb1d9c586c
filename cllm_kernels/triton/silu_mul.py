"""`silu_mul` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .block_attention import _narrow

BLOCK = 1024


@triton.jit
def _silu_mul(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    dtype: tl.constexpr = out.dtype.element_ty
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    # Rounded before it is multiplied, as by two operations of PyTorch.
    activated = _narrow(x / (1.0 + tl.exp(-x)), dtype).to(tl.float32)
    tl.store(out + at, _narrow(activated * y, dtype), mask=inside)


def silu_mul(gate, up) -> torch.Tensor:
    """The op on arguments that have been checked and are contiguous; see `cllm_kernels.ops.silu_mul`."""
    out = torch.empty_like(gate)
    if out.numel():
        _silu_mul[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), BLOCK=BLOCK, num_warps=4)
    return out
