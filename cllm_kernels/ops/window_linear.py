"""A linear layer for the few rows of a decoding window."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .. import backends
from ._library import check_last_dim, check_rank, check_same, check_shape, register
from .block_attention import DTYPE_CODES

DTYPES = (torch.float32, torch.bfloat16)


def fast_rows(dtype: torch.dtype) -> int:
    """How many rows the C++ kernel takes before torch's is the faster one.

    Times of up to 64 rows are in benchmarks/test_linear.py. With more, oneDNN's packed weights pay where the CPU multiplies
    bfloat16 without AMX; with AVX-512 and AVX2 alone the C++ kernel stayed twice as fast, up to 512, and with AMX as fast.
    In float32 on an Intel CPU, MKL takes 0.6 to 1 of the time of float32 products from 64 rows on, which buys equal bits. With
    AMX, layers of 64 rows that come from memory take less time than MKL, small ones mostly more. Other CPUs were not measured.
    """
    slower = dtype == torch.bfloat16 and backends.EXTENSION.cpu_isa() in ("avx512bf16", "baseline")
    return 128 if slower else 512


def window_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """``x Wᵀ + b`` on the CPU, at about the cost of reading the weights once.

    x [..., K]; weight [N, K], with a contiguous last dimension and otherwise free strides, read where it lies; bias
    [N], all of one dtype (float32, bfloat16). Sums are accumulated in float32 and rounded once. Returns [..., N],
    contiguous.

    In C++, a result depends on its own row of x and on the weights alone: a row gives the same bits alone and in a
    window, so that decoding token by token and by windows agree. Above `fast_rows` rows, and where the backend is
    "torch", torch's own linear runs, for which this does not hold. With AMX, float32 is the exception: from 16 rows on,
    numbers are multiplied as sums of three bfloat16 numbers (Henry, Tang and Heinecke 2019, arXiv 1904.06376). There a row has
    equal bits whatever stands beside it, but others than in a call of fewer rows; sums are as close as float32's, within a
    factor of two, and infinities give NaN. CLLM_CPU_ISA=avx512bf16 leaves AMX out, which takes longer and has equal bits.

    With AVX-512 BF16 and AMX, products of bfloat16 are added in pairs and numbers below float32's normal range count as 0.

    For inference: gradients are not defined. Raises ValueError on shapes, dtypes, devices or strides that do not fit.
    """
    return _call(x, weight, bias, backend)


def check_layer(name: str, weight: torch.Tensor, bias: torch.Tensor | None, inputs: int, x: torch.Tensor) -> None:
    """A weight [N, inputs] and its bias [N] or None, of the dtype and on the device of x."""
    if weight.dim() != 2 or weight.size(1) != inputs or weight.size(0) < 1:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; it must be [N, {inputs}] with N at least 1")
    check_same(name, weight, "x", x)
    check_last_dim(name, weight)
    if bias is not None:
        check_shape(f"the bias of {name}", bias, (weight.size(0),))
        check_same(f"the bias of {name}", bias, "x", x)


def fits(tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a tensor is as an op on the CPU wants it, or is left out."""
    return tensor is None or (tensor.shape == shape and tensor.dtype is dtype and tensor.is_cpu)


def layer_fits(weight: torch.Tensor, bias: torch.Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether `check_layer` would pass on the CPU; False leaves it open. It takes a third of the time."""
    return fits(weight, shape, dtype) and weight.stride()[1] == 1 <= shape[0] and fits(bias, shape[:1], dtype)


def check_dtype(x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x has dtype {x.dtype}; allowed are float32 and bfloat16")


def check_rows(x: torch.Tensor) -> None:
    """x [B, n, H] of an allowed dtype, without an empty dimension."""
    check_rank("x", x, "B, n, H")
    check_dtype(x)
    if x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; B, n and H must be at least 1")


def resolve_cpu(backend: str, device: torch.device) -> str:
    """As `backends.resolve`, for an op that has no Triton kernel."""
    backend = backends.resolve(backend, device)
    if backend == "triton":
        raise RuntimeError("backend 'triton' was asked for but this op runs on the CPU alone, by 'cpp' and 'torch'")
    return backend


def layer_arguments(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[int, int, int, int]:
    """A linear layer as the extension takes it."""
    return weight.data_ptr(), 0 if bias is None else bias.data_ptr(), weight.stride()[0], weight.shape[0]


def _check(x, weight, bias) -> None:
    if x.dim() < 1 or x.size(-1) < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [..., K] with K at least 1")
    check_dtype(x)
    check_layer("weight", weight, bias, x.size(-1), x)


def reference(x, weight, bias=None, dtype=torch.float32) -> torch.Tensor:
    """The specification of `window_linear`, computed and returned in `dtype`."""
    product = x.to(dtype) @ weight.to(dtype).T
    return product if bias is None else product + bias.to(dtype)


def linear_reference(x, weight, bias=None) -> torch.Tensor:
    """`reference` with its result in the dtype of x."""
    return reference(x, weight, bias, torch.float64 if x.dtype == torch.float64 else torch.float32).to(x.dtype)


def _implementation(x, weight, bias=None, backend="auto") -> torch.Tensor:
    _check(x, weight, bias)
    *batch, inputs = x.shape
    dtype, outputs = x.dtype, weight.shape[0]
    backend = resolve_cpu(backend, x.device)
    rows = math.prod(batch)
    if backend == "torch" or not 1 <= rows <= fast_rows(dtype):
        return F.linear(x, weight, bias)
    x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    out = x.new_empty(*batch, outputs)
    backends.EXTENSION.linear(
        x.data_ptr(), inputs * dtype.itemsize, weight.data_ptr(), weight.stride()[0],
        0 if bias is None else bias.data_ptr(), out.data_ptr(),
        rows, inputs, outputs, DTYPE_CODES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _direct(x, weight, bias=None, backend="auto") -> torch.Tensor:
    # C++ does what `_implementation` does in less than half of its time, and leaves to it what is out of the ordinary
    if backend in ("auto", "cpp") and backends.EXTENSION is not None:
        out = backends.EXTENSION.linear_of_tensors(x, weight, bias, fast_rows(x.dtype), torch.get_num_threads())
        if out is not None:
            return out
    return _implementation(x, weight, bias, backend)


def _fake(x, weight, bias=None, backend="auto") -> torch.Tensor:
    _check(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.size(0))


_call = register(
    'window_linear(Tensor x, Tensor weight, Tensor? bias=None, str backend="auto") -> Tensor',
    _implementation,
    _fake,
    _direct,
)
