"""A linear layer for the few rows of a decoding window."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import backends
from ._library import check_device, check_last_dim, check_rank, check_same, check_shape, register
from .block_attention import DTYPE_CODES

DTYPES = (torch.float32, torch.bfloat16)
# The widest window for which the C++ kernel is never slower than torch's.
ROWS = 64


def window_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """``x Wᵀ + b`` on the CPU, at about the cost of reading the weights once.

    x [..., K]; weight [N, K], with a contiguous last dimension and otherwise free strides, read where it lies; bias
    [N], all of one dtype (float32, bfloat16). Sums are accumulated in float32 and rounded once. Returns [..., N],
    contiguous.

    In C++, a result depends on its own row of x alone: the same row gives the same bits in a window of 1 and in one of
    64, so that decoding token by token and by windows agree. Above `ROWS` rows, and where the backend is "torch",
    torch's own linear runs, for which this does not hold.

    For inference: gradients are not defined. Raises ValueError on shapes, dtypes, devices or strides that do not fit.
    """
    return _call(x, weight, bias, backend)


def _check(x, weight, bias) -> None:
    check_rank("weight", weight, "N, K")
    outputs, inputs = weight.shape
    if x.dim() < 1 or x.size(-1) != inputs:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be K = {inputs}, as the weight has it")
    if inputs < 1 or outputs < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; N and K must be at least 1")
    if x.dtype not in DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; allowed are float32 and bfloat16")
    check_same("weight", weight, "x", x)
    check_last_dim("weight", weight)
    if bias is not None:
        check_shape("bias", bias, (outputs,))
        check_same("bias", bias, "x", x)
    if x.device.type not in ("cpu", "meta"):
        check_device("x", x, "the CPU", torch.empty(0))


def reference(x, weight, bias=None, dtype=torch.float32) -> torch.Tensor:
    """The specification of `window_linear`, computed and returned in `dtype`."""
    product = x.to(dtype) @ weight.to(dtype).T
    return product if bias is None else product + bias.to(dtype)


def _implementation(x, weight, bias=None, backend="auto") -> torch.Tensor:
    _check(x, weight, bias)
    backend = backends.resolve(backend, x.device)
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    if backend == "triton":
        raise RuntimeError("window_linear has no Triton kernel; it runs on the CPU, by the backends cpp and torch")
    if backend == "torch" or not 1 <= rows <= ROWS:
        return F.linear(x, weight, bias)
    x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    out = x.new_empty(*x.shape[:-1], outputs)
    backends.EXTENSION.linear(
        x.data_ptr(), inputs * x.element_size(), weight.data_ptr(), weight.stride(0),
        0 if bias is None else bias.data_ptr(), out.data_ptr(),
        rows, inputs, outputs, DTYPE_CODES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _fake(x, weight, bias=None, backend="auto") -> torch.Tensor:
    _check(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.size(0))


_call = register(
    'window_linear(Tensor x, Tensor weight, Tensor? bias=None, str backend="auto") -> Tensor',
    _implementation,
    _fake,
)
