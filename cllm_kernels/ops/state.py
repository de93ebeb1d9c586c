"""The state of a Jacobi decode: one struct of tensors that Python, C++ and CUDA share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass

import torch

from .. import backends
from ._library import check_device, check_shape
from .philox import refill_draws
from .state_fields import FIELDS

REFILLS = ("context", "last")

_DTYPES = {"int32": torch.int32, "int64": torch.int64}
_LAYOUT = tuple((name, _DTYPES[dtype], tuple(shape.split())) for name, dtype, shape, _ in FIELDS)
_INDEX = {name: index for index, (name, _, _) in enumerate(_LAYOUT)}

_Fields = make_dataclass(
    "_Fields", [(name, torch.Tensor) for name, _, _ in _LAYOUT], frozen=True, eq=False
)


def _sizes(rows: int, width: int, capacity: int, context: int, eos: int) -> dict[str, int]:
    return {"B": rows, "n": width, "n+1": width + 1, "T": capacity, "C": context, "E": eos, "2": 2}


def check_state(tensors: Sequence[torch.Tensor]) -> None:
    """Raises ValueError unless the tensors, in the order of `state_fields.FIELDS`, form one state."""
    window, output = tensors[_INDEX["window"]], tensors[_INDEX["output"]]
    context, eos = tensors[_INDEX["context"]], tensors[_INDEX["eos"]]
    for name, tensor, rank in (("window", window, 2), ("output", output, 2), ("context", context, 2), ("eos", eos, 1)):
        if tensor.dim() != rank:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must have {rank} dimensions")
    sizes = _sizes(window.size(0), window.size(1), output.size(1), context.size(1), eos.size(0))
    for size in ("n", "C"):
        if sizes[size] < 1:
            name = "window" if size == "n" else "context"
            raise ValueError(f"{name} has shape {(sizes['B'], sizes[size])}; it must have at least one column")
    device = window.device
    for (name, dtype, shape), tensor in zip(_LAYOUT, tensors, strict=True):
        expected = tuple([sizes[size] for size in shape])
        # One condition, since this runs in every iteration of the loop.
        if (
            tensor.dtype != dtype
            or tensor.shape != expected
            or not tensor.is_contiguous()
            or tensor.device != device
        ):
            if tensor.dtype != dtype:
                raise ValueError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
            check_shape(name, tensor, expected)
            if not tensor.is_contiguous():
                raise ValueError(f"{name} has strides {tuple(tensor.stride())}; it must be contiguous")
            check_device(name, tensor, "window", window)


@dataclass(frozen=True, eq=False, repr=False)
class JacobiState(_Fields):
    """Everything that one Jacobi decode carries from forward to forward, as tensors on one device.

    The fields, their dtypes and shapes are those of `state_fields.FIELDS`; `help` lists them below. The
    tensors are updated in place by `converge_` and never replaced (the class is frozen), so that their
    addresses can be captured.

    Raises ValueError when a tensor's dtype, shape, layout or device does not fit.
    """

    __doc__ += "\n" + "\n".join(
        f"    {name}: {dtype} [{shape.replace(' ', ', ')}]. {doc}." for name, dtype, shape, doc in FIELDS
    )

    def __post_init__(self) -> None:
        check_state(self.tensors())

    def __repr__(self) -> str:
        return (
            f"JacobiState(rows={self.rows}, width={self.width}, capacity={self.capacity}, "
            f"context={self.context.size(1)}, eos={self.eos.size(0)}, device={self.device})"
        )

    @classmethod
    def allocate(
        cls,
        rows: int,
        width: int,
        capacity: int,
        context_width: int = 1,
        eos_count: int = 0,
        device: torch.device | str | None = None,
    ) -> JacobiState:
        """A state of zeros, except that `block_left` is `width`."""
        sizes = _sizes(rows, width, capacity, context_width, eos_count)
        state = cls(
            **{
                name: torch.zeros([sizes[size] for size in shape], dtype=dtype, device=device)
                for name, dtype, shape in _LAYOUT
            }
        )
        state.block_left.fill_(width)
        return state

    @classmethod
    def create(
        cls,
        prompt: torch.Tensor,
        starts: torch.Tensor | Sequence[int] | None = None,
        limits: torch.Tensor | Sequence[int] | int = 1,
        block_size: int = 16,
        eos: torch.Tensor | Sequence[int] = (),
        seeds: torch.Tensor | Sequence[int] | int = 0,
        device: torch.device | str | None = None,
        *,
        capacity: int | None = None,
        refill: str = "context",
    ) -> JacobiState:
        """The state in which decoding starts behind a prompt.

        prompt: integers [B, P], left padded, P >= 1; it becomes `context`, and its last column `window[:, 0]`.
        starts: first valid column of each row, in [0, P); None means 0.
        limits: most new tokens, one number or one a row. A row with limit 0 starts done.
        block_size: the window's width n >= 1.
        eos: tokens that end a row.
        seeds: Philox keys, one a row; one number is the key of every row, so that what a row draws does not
            depend on the batch around it.
        device: of the state; None means the prompt's.
        capacity: columns of `output`; None means the largest limit.
        refill: how the first drafts are chosen, see `refill_all_`.

        `lengths` starts at P - 1: the cache is expected to hold every prompt token but the last.

        Raises ValueError on a value out of the ranges above.
        """
        device = prompt.device if device is None else torch.device(device)
        if prompt.dim() != 2 or prompt.size(1) < 1 or prompt.is_floating_point():
            raise ValueError(
                f"prompt is {prompt.dtype} of shape {tuple(prompt.shape)}; it must hold integers [B, P] with P >= 1"
            )
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; it must be at least 1")
        rows, width = prompt.shape

        def per_row(name: str, value, dtype: torch.dtype) -> torch.Tensor:
            tensor = torch.as_tensor(value, dtype=dtype, device="cpu")
            if tensor.dim() == 0:
                tensor = tensor.expand(rows)
            check_shape(name, tensor, (rows,))
            return tensor

        starts = per_row("starts", 0 if starts is None else starts, torch.int32)
        limits = per_row("limits", limits, torch.int32)
        seeds = per_row("seeds", seeds, torch.int64)
        eos = torch.as_tensor(eos, dtype=torch.int64, device="cpu")
        if eos.dim() != 1:
            raise ValueError(f"eos has shape {tuple(eos.shape)}; it must be a list of token numbers")
        if rows and not (0 <= int(starts.min()) and int(starts.max()) < width):
            raise ValueError(f"starts is {starts.tolist()}; each must be in [0, {width}), a column of the prompt")
        largest = int(limits.max()) if rows else 0
        capacity = largest if capacity is None else capacity
        if rows and not (0 <= int(limits.min()) and largest <= capacity):
            raise ValueError(f"limits is {limits.tolist()}; each must be in [0, {capacity}], the output's capacity")

        # On the CPU first: on a GPU, the first drafts alone would take hundreds of launches.
        state = cls.allocate(rows, block_size, capacity, width, eos.size(0), "cpu")
        prompt = prompt.cpu()
        state.window[:, 0] = prompt[:, -1]
        state.lengths.fill_(width - 1)
        state.limits.copy_(limits)
        state.done.copy_((limits == 0).to(torch.int32) * 2)
        state.seeds.copy_(seeds)
        state.context.copy_(prompt)
        state.context_start.copy_(starts)
        state.eos.copy_(eos)
        state.status[0] = int((limits > 0).sum())
        state.refill_all_(refill)
        return state if device.type == "cpu" else cls(*(tensor.to(device) for tensor in state.tensors()))

    @property
    def rows(self) -> int:
        return self.window.size(0)

    @property
    def width(self) -> int:
        return self.window.size(1)

    @property
    def capacity(self) -> int:
        return self.output.size(1)

    @property
    def device(self) -> torch.device:
        return self.window.device

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The fields in the order of `state_fields.FIELDS`, which is that of the op's arguments."""
        return tuple(getattr(self, name) for name, _, _ in _LAYOUT)

    def clone(self) -> JacobiState:
        """A state whose tensors are copies."""
        return JacobiState(*(tensor.clone() for tensor in self.tensors()))

    def first(self, rows: int) -> JacobiState:
        """The state of the first rows, in the same memory; itself where these are all."""
        if rows == self.rows:
            return self
        return JacobiState(
            *(
                tensor[:rows] if shape[0] == "B" else tensor
                for (_, _, shape), tensor in zip(_LAYOUT, self.tensors(), strict=True)
            )
        )

    def copy_(self, other: JacobiState) -> None:
        """Takes the values of another state of the same sizes; the tensors stay where they are."""
        for tensor, new in zip(self.tensors(), other.tensors(), strict=True):
            tensor.copy_(new)

    def refill_all_(self, refill: str = "context") -> None:
        """Replaces the drafts `window[:, 1:]` of every row, also in `kept` and `since`, without a host sync.

        "context" draws tokens of the row's context by the rule of `converge_` with draw number 0; "last"
        repeats `window[:, 0]`. Raises ValueError on another name.
        """
        check_refill(refill)
        self.kept.zero_()
        self.since.copy_(self.iterations[:, None] + 1)
        if refill == "last":
            self.window[:, 1:] = self.window[:, :1]
            return
        # Not by `resolve`: a state for a GPU is made on the CPU, where CLLM_BACKEND may name what runs on the GPU alone.
        if self.device.type == "cpu" and backends.EXTENSION is not None and os.environ.get("CLLM_BACKEND") != "torch":
            pointers = [tensor.data_ptr() for tensor in self.tensors()]
            backends.EXTENSION.context_drafts(pointers, self.rows, self.width, self.context.size(1))
            return
        tokens = self.produced[:, None] - 1 + torch.arange(self.width, device=self.device)
        drafts = context_drafts(self.context, self.context_start, self.seeds, tokens, torch.zeros_like(self.seeds))
        self.window[:, 1:] = drafts[:, 1:]


def check_refill(refill: str) -> None:
    if refill not in REFILLS:
        raise ValueError(f"refill is {refill!r}; allowed are {', '.join(map(repr, REFILLS))}")


def context_drafts(
    context: torch.Tensor,
    context_start: torch.Tensor,
    seeds: torch.Tensor,
    tokens: torch.Tensor,
    draws: torch.Tensor,
) -> torch.Tensor:
    """A random token of each row's context for every absolute index in `tokens` int64 [B, n]."""
    # Rows that are done are drawn for too, and may hold anything.
    start = context_start.long().clamp(0, context.size(1) - 1)[:, None]
    random = refill_draws(seeds, tokens, draws)
    return context.gather(1, start + random % (context.size(1) - start))
