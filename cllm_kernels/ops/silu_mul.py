"""The activation of a gated MLP, on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import backends
from ._library import check_float, check_same, check_shape, register


def silu_mul(gate: torch.Tensor, up: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """``silu(gate) * up`` (SwiGLU: Shazeer, 2020, arXiv:2002.05202), each of the two rounded to the dtype.

    gate and up of one shape, one dtype (float32, bfloat16, float16) and on one device. Returns what is like them,
    contiguous.

    For inference: gradients are not defined. Backends are "triton" and "torch", the reference. Raises ValueError on shapes,
    dtypes or devices that do not fit, and RuntimeError on a backend that cannot run.
    """
    return _call(gate, up, backend)


def _check(gate, up) -> None:
    check_float("gate", gate)
    check_shape("up", up, gate.shape)
    check_same("up", up, "gate", gate)


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _implementation(gate, up, backend="auto") -> torch.Tensor:
    _check(gate, up)
    if backends.resolve(backend, gate.device, kernels=("triton",)) == "torch":
        return reference(gate, up)
    from ..triton.silu_mul import silu_mul as run

    with torch.cuda.device_of(gate):  # Triton launches on the current device
        return run(gate.contiguous(), up.contiguous())


def _fake(gate, up, backend="auto") -> torch.Tensor:
    _check(gate, up)
    return gate.new_empty(gate.shape)


_call = register('silu_mul(Tensor gate, Tensor up, str backend="auto") -> Tensor', _implementation, _fake)
