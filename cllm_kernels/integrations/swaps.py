"""Attributes of a model that are others while it decodes, but not where somebody else's code runs in the meantime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

_MISSING = object()


class Swaps:
    """Gives objects other attributes inside the context, and those they had after it.

    Args:
        objects: each with the name of an attribute of its own and the value that this gets.
    """

    def __init__(self, objects: Iterable[tuple[object, str, object]]):
        # __dict__, since setattr of modules looks for parameters and submodules
        self.entries = [(x.__dict__, name, value, x.__dict__.get(name, _MISSING)) for x, name, value in objects]

    def __enter__(self) -> Swaps:
        for own, name, value, _ in self.entries:
            own[name] = value
        return self

    def __exit__(self, *error) -> None:
        for own, name, _, before in self.entries:
            if before is _MISSING:
                own.pop(name, None)
            else:
                own[name] = before


@contextlib.contextmanager
def outside(swaps: list[Swaps]) -> Iterator[None]:
    """Inside the swaps and inference mode: as it was outside of both, without gradients, as generate calls others."""
    for swap in reversed(swaps):
        swap.__exit__()
    try:
        torch.clear_autocast_cache()  # of tensors of inference mode
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for swap in swaps:
            swap.__enter__()
