"""The `torch.library` namespace of the package and the checks that its ops share."""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("cllm_kernels", "DEF")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Defines an op with one implementation for every device, which dispatches on its backend.

    `Library.define` and `impl` cost less per call than `torch.library.custom_op`.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cllm_kernels::{name}", fake, lib=LIBRARY)


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
