"""A greedy step of Jacobi decoding from predictions that were made without logits."""

from __future__ import annotations

import torch

from .. import backends
from ._library import check_device, check_last_dim, check_shape, register
from .converge import MODES, STEP_SCHEMA, advance, check_step, state_arguments
from .state import REFILLS, JacobiState
from .state_fields import FIELDS


def converge_predictions_(
    predictions: torch.Tensor,
    values: torch.Tensor,
    state: JacobiState,
    mode: str = "window",
    refill: str = "context",
    backend: str = "auto",
) -> None:
    """What `converge_` does to `state` at temperature 0, with the predictions in the place of the logits.

    predictions int64 [B, n], the argmax of the logits at each position, and values float32 [B, n], the logits there, as
    `lm_head_argmax` returns both; contiguous in the last dimension, on the state's device. A value that is NaN stands
    for NaN among the logits, and its row and position are treated as in `converge_`.

    Backends are "cpp" and "torch", the reference, which "auto" takes on a GPU.

    Raises ValueError as `converge_` does, and RuntimeError on a backend that cannot run.
    """
    _call(predictions, values, *state.tensors(), mode, refill, backend)


def reference(predictions, values, state, mode="window", refill="context") -> None:
    """The specification of `converge_predictions_`."""
    advance(predictions, values.isnan(), state, mode, refill)


def _check(predictions, values, tensors, mode, refill) -> None:
    check_step(tensors, mode, refill)
    window = tensors[0]
    for name, tensor, dtype in (("predictions", predictions, torch.int64), ("values", values, torch.float32)):
        check_shape(name, tensor, tuple(window.shape))
        if tensor.dtype != dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
        check_last_dim(name, tensor)
        check_device(name, tensor, "the state", window)


def _implementation(predictions, values, *arguments) -> None:
    tensors, (mode, refill, backend) = arguments[: len(FIELDS)], _options(arguments)
    _check(predictions, values, tensors, mode, refill)
    if backends.resolve(backend, predictions.device, kernels=("cpp",)) == "torch":
        reference(predictions, values, JacobiState(*tensors), mode, refill)
        return
    backends.EXTENSION.converge_predictions(
        predictions.data_ptr(), predictions.stride(0), values.data_ptr(), values.stride(0), *predictions.shape,
        *state_arguments(tensors), MODES.index(mode), REFILLS.index(refill),
    )  # fmt: skip


def _fake(predictions, values, *arguments) -> None:
    mode, refill, _ = _options(arguments)
    _check(predictions, values, arguments[: len(FIELDS)], mode, refill)


def _options(arguments: tuple) -> tuple[str, str, str]:
    """mode, refill and backend, as in `converge_`."""
    given = arguments[len(FIELDS) :]
    return given + ("window", "context", "auto")[len(given) :]


_call = register(
    f'converge_predictions_(Tensor predictions, Tensor values, {STEP_SCHEMA}, str backend="auto") -> ()',
    _implementation,
    _fake,
)
