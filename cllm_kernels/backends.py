"""Which implementation of an op runs, and why the others cannot."""

from __future__ import annotations

import os
from types import ModuleType

import torch  # before cllm_kernels._C, so that both use the OpenMP runtime that torch ships

from .ops.state_fields import FIELDS

NAMES = ("cpp", "torch")
# Names that other builds may have.
PLANNED = ("triton", "cuda")


def _load() -> tuple[ModuleType | None, str | None]:
    """The compiled module, or why there is none."""
    try:
        from . import _C
    except ImportError as error:
        return None, f"cllm_kernels._C is not built: {error}; CLLM_REQUIRE_EXT=1 makes the build show why"
    compiled = tuple(_C.state_fields())
    if compiled != tuple(field[:3] for field in FIELDS):
        return None, "stale build: cllm_kernels._C was compiled for other fields of JacobiState; build it again"
    return _C, None


EXTENSION, _REASON = _load()


def available() -> dict[str, str | None]:
    """Each backend's name with None if it can run here, else the reason why it cannot."""
    return {"cpp": _REASON, "torch": None} | {name: "not in this build" for name in PLANNED}


def resolve(name: str, device: torch.device) -> str:
    """The backend that runs when `name` is asked for with tensors on `device`.

    "auto" takes the environment variable CLLM_BACKEND if it is set, else "cpp" where it is built and the
    device is a CPU, else "torch".

    Raises ValueError on an unknown name and RuntimeError on one that cannot run, with the reason.
    """
    if name == "auto":
        name = os.environ.get("CLLM_BACKEND") or "auto"
        if name == "auto":
            return "cpp" if EXTENSION is not None and device.type == "cpu" else "torch"
    if name == "torch":
        return name
    if name == "cpp":
        if EXTENSION is None:
            raise RuntimeError(f"backend 'cpp' was asked for but {_REASON}")
        if device.type != "cpu":
            raise RuntimeError(f"backend 'cpp' was asked for but the tensors are on {device}; it runs on the CPU")
        return name
    if name in PLANNED:
        raise RuntimeError(f"backend {name!r} was asked for but it is not in this build")
    allowed = ", ".join(map(repr, ("auto", *NAMES, *PLANNED)))
    raise ValueError(f"backend is {name!r}; allowed are {allowed}")
