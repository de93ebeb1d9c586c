"""Runs a model's linear layers by :func:`cllm_kernels.ops.window_linear` while it decodes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ..backends import resolve
from ..ops import window_linear
from ..ops.window_linear import DTYPES


@dataclasses.dataclass(frozen=True)
class Optimized:
    """What :func:`optimize` did.

    Attributes:
        swapped: names of the modules that run by ops of this package.
        left: names of the linear layers that were left alone, with the reason.
    """

    swapped: tuple[str, ...]
    left: dict[str, str]


@contextlib.contextmanager
def optimize(model: nn.Module, backend: str = "auto") -> Iterator[Optimized]:
    """Runs the linear layers of ``model`` by the package's own kernels inside the context, and as before after it.

    Weights stay where they are: nothing is copied, so the state dict, ``save_pretrained`` and weights that change
    are not concerned. Calls that need gradients, run under autocast or have more rows than a decoding window go to
    torch as before. Linear layers of another class (quantised ones, adapters), with weights of another kind or
    with a forward that was replaced are left alone. Hooks run as they do without it.

    :class:`JacobiConfig` has an option that does this for each call of generate. Nothing is swapped where the C++
    kernels do not run, as on a GPU.

    Yields:
        what was swapped and what was left alone.
    """
    swapped: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    try:
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            reason = _reason(module, backend)
            if reason is None:
                swapped[name] = module
                module.__dict__["forward"] = functools.partial(_linear, module._parameters)
            else:
                left[name] = reason
        yield Optimized(tuple(swapped), left)
    finally:
        for module in swapped.values():
            del module.__dict__["forward"]


def _linear(parameters: dict[str, torch.Tensor | None], input: torch.Tensor) -> torch.Tensor:
    weight, bias = parameters["weight"], parameters["bias"]
    if input.dtype != weight.dtype or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(input, weight, bias)
    return window_linear(input, weight, bias, "cpp")


def _reason(module: nn.Linear, backend: str) -> str | None:
    """Why a linear layer is left alone, or None."""
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__qualname__}"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    for name, tensor in module._parameters.items():
        if tensor is None:
            continue
        if type(tensor) is not nn.Parameter:
            return f"its {name} is a {type(tensor).__qualname__}"
        if tensor.dtype not in DTYPES or tensor.dtype != module.weight.dtype:
            return f"its {name} is in {tensor.dtype}"
        if tensor.layout != torch.strided or tensor.stride(-1) != 1:
            return f"its {name} is not contiguous"
        if tensor.device.type != "cpu" or resolve(backend, tensor.device) != "cpp":
            return f"the C++ kernels do not run for its {name} on {tensor.device} by backend {backend!r}"
    return None
