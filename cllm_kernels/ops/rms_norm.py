"""RMSNorm, with the addition before it."""

from __future__ import annotations

import torch

from .. import backends
from ._library import check_float, check_same, check_shape, register
from .block_attention import DTYPE_CODES

# Elements of a row at most: one block holds a row in its registers.
MAX_SIZE = 1 << 15


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, backend: str = "auto") -> torch.Tensor:
    """``weight * x / sqrt(mean(x²) + eps)`` over the last dimension, rounded as by transformers' LlamaRMSNorm.

    x [..., H] with H at most `MAX_SIZE` and weight [H], of one dtype (float32, bfloat16, float16) and on one device. In 16
    bits the sum is taken in float32, and the quotient is rounded before it is multiplied. Returns [..., H], contiguous.
    RMSNorm: Zhang and Sennrich, 2019, arXiv:1910.07467.

    For inference: gradients are not defined. Backends are "triton", "cpp" for float32 and bfloat16, and "torch", the
    reference. Raises ValueError on shapes, dtypes or devices that do not fit, and RuntimeError on a backend that cannot run.
    """
    return _norm(x, weight, eps, backend)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + delta``, rounded to their dtype, and what :func:`rms_norm` makes of it; delta is like x. Raises as that does.

    There is no backend "cpp".
    """
    return _add_norm(x, delta, weight, eps, backend)


def _check(x, weight, delta=None) -> None:
    check_float("x", x)
    if x.dim() < 1 or not 1 <= x.size(-1) <= MAX_SIZE:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [..., H] with H from 1 to {MAX_SIZE}")
    check_shape("weight", weight, (x.size(-1),))
    check_same("weight", weight, "x", x)
    if delta is not None:
        check_shape("delta", delta, x.shape)
        check_same("delta", delta, "x", x)


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _run(x, delta, weight, eps):
    from ..triton.rms_norm import rms_norm as run

    with torch.cuda.device_of(x):  # Triton launches on the current device
        return run(x.contiguous(), None if delta is None else delta.contiguous(), weight.contiguous(), eps)


def _norm_implementation(x, weight, eps, backend="auto") -> torch.Tensor:
    _check(x, weight)
    kernels = ("triton",) if x.dtype == torch.float16 else ("cpp", "triton")
    backend = backends.resolve(backend, x.device, kernels=kernels)
    if backend == "torch":
        return reference(x, weight, eps)
    if backend == "triton":
        return _run(x, None, weight, eps)[1]
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    backends.EXTENSION.rms_norm(
        x.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), x.numel() // width, width, DTYPE_CODES[x.dtype]
    )
    return out


def _add_norm_implementation(x, delta, weight, eps, backend="auto") -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, weight, delta)
    if backends.resolve(backend, x.device, kernels=("triton",)) == "torch":
        total = x + delta
        return total, reference(total, weight, eps)
    return _run(x, delta, weight, eps)


def _norm_fake(x, weight, eps, backend="auto") -> torch.Tensor:
    _check(x, weight)
    return x.new_empty(x.shape)


def _add_norm_fake(x, delta, weight, eps, backend="auto") -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, weight, delta)
    return x.new_empty(x.shape), x.new_empty(x.shape)


_norm = register(
    'rms_norm(Tensor x, Tensor weight, float eps, str backend="auto") -> Tensor', _norm_implementation, _norm_fake
)
_add_norm = register(
    'add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps, str backend="auto") -> (Tensor, Tensor)',
    _add_norm_implementation,
    _add_norm_fake,
)
