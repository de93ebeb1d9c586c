"""Which implementation of an op runs, and why the others cannot."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch  # before cllm_kernels._C, so that both use the OpenMP runtime that torch ships

from .ops.state_fields import FIELDS

NAMES = ("cpp", "triton", "torch")
# Names that other builds may have.
PLANNED = ("cuda",)


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


def _triton_reason() -> str | None:
    """Why Triton's kernels cannot run, or None. Asks for no device: importing the package starts no CUDA context."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (torch.version.cuda or interpreted()):
        return "this torch is built without CUDA; TRITON_INTERPRET=1 runs Triton's kernels on the CPU, slowly"
    return None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def available() -> dict[str, str | None]:
    """Each backend's name with None if it can run here, else the reason why it cannot."""
    return {"cpp": _REASON, "triton": _triton_reason(), "torch": None} | {name: "not in this build" for name in PLANNED}


def resolve(name: str, device: torch.device, kernels: tuple[str, ...] = ("cpp", "triton")) -> str:
    """The backend that runs when `name` is asked for with tensors on `device`.

    "auto" takes the environment variable CLLM_BACKEND if it is set, else "triton" on a CUDA device and "cpp" on the
    CPU, each where it is there, else "torch". kernels: the backends that the op has beside "torch".

    Raises ValueError on an unknown name and RuntimeError on one that cannot run, with the reason.
    """
    if name == "auto":
        name = os.environ.get("CLLM_BACKEND") or "auto"
        if name == "auto":
            if device.type == "cpu":
                return "cpp" if EXTENSION is not None and "cpp" in kernels else "torch"
            runs = device.type == "cuda" and not interpreted() and _triton_reason() is None
            return "triton" if runs else "torch"
    if name == "torch":
        return name
    if name in NAMES and name not in kernels:
        allowed = ", ".join(map(repr, ("auto", *kernels, "torch")))
        raise RuntimeError(f"backend {name!r} was asked for but this op has no such kernel; allowed are {allowed}")
    if name == "cpp":
        if EXTENSION is None:
            raise RuntimeError(f"backend 'cpp' was asked for but {_REASON}")
        if device.type != "cpu":
            raise RuntimeError(f"backend 'cpp' was asked for but the tensors are on {device}; it runs on the CPU")
        return name
    if name == "triton":
        if _triton_reason() is not None:
            raise RuntimeError(f"backend 'triton' was asked for but {_triton_reason()}")
        if device.type != ("cpu" if interpreted() else "cuda"):
            where = "on the CPU, in its interpreter (TRITON_INTERPRET is set)" if interpreted() else "on CUDA devices"
            raise RuntimeError(f"backend 'triton' was asked for but the tensors are on {device}; it runs {where}")
        return name
    if name in PLANNED:
        raise RuntimeError(f"backend {name!r} was asked for but it is not in this build")
    allowed = ", ".join(map(repr, ("auto", *NAMES, *PLANNED)))
    raise ValueError(f"backend is {name!r}; allowed are {allowed}")
