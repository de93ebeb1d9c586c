"""From the attention's output to a decoder layer's output, for a window."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import backends
from ._library import check_rank, check_same, check_shape, register
from .block_attention import DTYPE_CODES
from .window_linear import (
    DTYPES, check_layer, check_rows, fits, layer_arguments, layer_fits, linear_reference, resolve_cpu,
)  # fmt: skip
from .rms_norm import reference as rms_norm_reference


def window_mlp(
    x: torch.Tensor,
    attended: torch.Tensor,
    output: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    output_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The attention's output projection, RMSNorm and a gated MLP, with both residuals, for a window on the CPU.

    ``h = x + attended outputᵀ + output_bias`` and ``h + (silu(m gateᵀ) * (m upᵀ)) downᵀ`` with m = RMSNorm(h).

    x [B, n, H], the layer's input; attended [B, n, A]; output [H, A]; norm [H] with eps as in `window_qkv`; gate and up
    [I, H]; down [H, I]; all of one dtype (float32, bfloat16), matrices as in `window_linear`. Returns [B, n, H],
    contiguous. Each row depends on its own rows alone, as in `window_linear`. In bfloat16, every step is rounded, as by a
    module of transformers.

    For inference: gradients are not defined. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    return _call(x, attended, output, norm, eps, gate, up, down, output_bias, backend)


def mlp_weights_fit(hidden, inputs, dtype, output, norm, gate, up, down, output_bias) -> bool:
    """Whether a layer's weights are as `window_mlp` wants them on the CPU; False leaves it open."""
    inner = gate.shape[0]
    return (
        fits(norm, (hidden,), dtype)
        and layer_fits(output, output_bias, (hidden, inputs), dtype)
        and layer_fits(gate, None, (inner, hidden), dtype)
        and layer_fits(up, None, (inner, hidden), dtype)
        and layer_fits(down, None, (hidden, inner), dtype)
    )


def _fits(x, attended, *weights) -> bool:
    """Whether `_check` would pass, for the arguments of every layer of every forward; False leaves it open."""
    shape, dtype = x.shape, x.dtype
    if len(shape) != 3 or dtype not in DTYPES or not x.is_cpu:
        return False
    batch, width, hidden = shape
    inputs = attended.shape[-1]
    return (
        batch * width >= 1
        and hidden >= 1 <= inputs
        and fits(attended, (batch, width, inputs), dtype)
        and mlp_weights_fit(hidden, inputs, dtype, *weights)
    )


def _check(x, attended, output, norm, gate, up, down, output_bias) -> None:
    if _fits(x, attended, output, norm, gate, up, down, output_bias):
        return
    check_rows(x)
    batch, width, hidden = x.shape
    check_rank("attended", attended, "B, n, A")
    check_shape("attended", attended, (batch, width, attended.size(2)))
    check_shape("norm", norm, (hidden,))
    check_same("attended", attended, "x", x)
    check_same("norm", norm, "x", x)
    check_layer("output", output, output_bias, attended.size(2), x)
    check_layer("gate", gate, None, hidden, x)
    check_layer("up", up, None, hidden, x)
    check_layer("down", down, None, gate.size(0), x)
    check_shape("up", up, (gate.size(0), hidden))
    check_shape("output", output, (hidden, attended.size(2)))
    check_shape("down", down, (hidden, gate.size(0)))


def reference(x, attended, output, norm, eps, gate, up, down, output_bias=None) -> torch.Tensor:
    """The specification of `window_mlp`, in the dtype of its arguments."""
    h = x + linear_reference(attended, output, output_bias)
    m = rms_norm_reference(h, norm, eps)
    return h + linear_reference(F.silu(linear_reference(m, gate)) * linear_reference(m, up), down)


def _implementation(x, attended, output, norm, eps, gate, up, down, output_bias=None, backend="auto") -> torch.Tensor:
    _check(x, attended, output, norm, gate, up, down, output_bias)
    backend = resolve_cpu(backend, x.device)
    if backend == "torch":
        return reference(x, attended, output, norm, eps, gate, up, down, output_bias)
    batch, width, hidden = x.shape
    x, attended, norm = x.contiguous(), attended.contiguous(), norm.contiguous()
    if output_bias is not None:
        output_bias = output_bias.contiguous()
    out = torch.empty_like(x)
    backends.EXTENSION.mlp(
        x.data_ptr(), attended.data_ptr(), layer_arguments(output, output_bias), norm.data_ptr(), eps,
        layer_arguments(gate, None), layer_arguments(up, None), layer_arguments(down, None), out.data_ptr(),
        batch * width, hidden, attended.size(2), DTYPE_CODES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def _fake(x, attended, output, norm, eps, gate, up, down, output_bias=None, backend="auto") -> torch.Tensor:
    _check(x, attended, output, norm, gate, up, down, output_bias)
    return x.new_empty(x.shape)


_call = register(
    "window_mlp(Tensor x, Tensor attended, Tensor output, Tensor norm, float eps, Tensor gate, Tensor up, Tensor down, "
    'Tensor? output_bias=None, str backend="auto") -> Tensor',
    _implementation,
    _fake,
)
