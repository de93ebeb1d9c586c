"""The `torch.library` namespace of the package and the checks that its ops share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack

LIBRARY = torch.library.Library("cllm_kernels", "DEF")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The numbers by which C++ knows them (csrc/common/types.h).
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def register(schema: str, implementation: Callable, fake: Callable, direct: Callable | None = None) -> Callable:
    """Defines an op with one implementation for every device, which chooses its backend.

    Returns a function of the op's arguments, of which the first is a tensor. It calls the implementation at once
    where nothing else may take the call, since torch's dispatcher costs some 20 us, as much as a small op takes.
    `Library.define` and `impl` cost less per call than `torch.library.custom_op`.

    direct: the implementation that is called at once, where the callers of that function have checked a part of the
    arguments already; None for the same one.
    """
    direct = direct or implementation
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cllm_kernels::{name}", fake, lib=LIBRARY)
    overload = getattr(torch.ops.cllm_kernels, name).default
    accepted: set[tuple[type, ...]] = set()  # types of arguments that the dispatcher found to fit the schema

    def call(*arguments):
        if torch.compiler.is_compiling():
            return overload(*arguments)
        types = tuple(map(type, arguments))
        if types in accepted and not watched(arguments[0]):
            return direct(*arguments)
        result = overload(*arguments)
        if _PLAIN.issuperset(types):
            accepted.add(types)
        return result

    return call


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str))


def watched(tensor: torch.Tensor) -> bool:
    """Whether autograd, a dispatch mode, a transform of functorch, a profiler or the meta device takes calls."""
    return (
        torch.is_grad_enabled()
        or _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or torch.autograd.profiler._is_profiler_enabled
        or tensor.is_meta
    )


def check_float(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed are float32, bfloat16 and float16")


def check_rank(name: str, tensor: torch.Tensor, shape: str) -> None:
    rank = shape.count(",") + 1
    if tensor.dim() != rank:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be [{shape}]")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}")


def check_same(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """The same dtype and device."""
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be that of {other_name}, {other.dtype}")
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {other.device}, as {other_name} is")


def check_last_dim(name: str, tensor: torch.Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.size(-1) > 1:
        raise ValueError(
            f"{name} has strides {tuple(tensor.stride())}; the last dimension must be contiguous (stride 1)"
        )


def check_rows(name: str, tensor: torch.Tensor, batch: int, other_name: str, other: torch.Tensor) -> None:
    """An int32 vector with one entry a batch row."""
    if tensor.dtype != torch.int32:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be int32")
    check_shape(name, tensor, (batch,))
    check_device(name, tensor, other_name, other)
