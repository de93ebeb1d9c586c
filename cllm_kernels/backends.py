"""Which implementation of an op runs, and why the others cannot."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch  # before cllm_kernels._C, so that both use the OpenMP runtime that torch ships

from .ops.state_fields import FIELDS

NAMES = ("cpp", "cuda", "triton", "torch")
# On a CUDA device "auto" is the first of these that can run the call, but for block_attention.
GPU_ORDER = ("cuda", "triton", "torch")
# Which of the first two was measured to be faster in block_attention, by the GPU's name and `attention_cell`; Triton where
# nothing was measured, since it was faster at every size on the one GPU so far, an H100. Written by
# benchmarks/attention_table.py; CLLM_ATTENTION_TABLE names another file, or none where it is empty.
ATTENTION_TABLE = Path(__file__).with_name("attention_table.json")


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
# The functions on a GPU, where the build has them.
CUDA: ModuleType | None = getattr(EXTENSION, "cuda", None)


def _version(number: int) -> str:
    """CUDA's number of a version, 13000, as people write it: 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _driver_reason(cuda: ModuleType) -> str | None:
    """Why the driver cannot run a build, or None. Starts no CUDA context."""
    driver, runtime = cuda.driver_version(), cuda.runtime_version()
    if not driver:
        return "there is no CUDA driver"
    if driver // 1000 < runtime // 1000:
        return f"the driver runs CUDA up to {_version(driver)}, and the kernels were built with {_version(runtime)}"
    return None


def _cuda_reason() -> str | None:
    """Why the CUDA kernels cannot run on any device, or None."""
    if EXTENSION is None:
        return _REASON
    if CUDA is None:
        return "this build has no CUDA kernels; CLLM_CUDA=1 makes the build show why"
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    return _driver_reason(CUDA)


@functools.cache
def _coverage_reason(device: torch.device) -> str | None:
    """Why the build has no code for a device, or None: binary code runs on its major version from its minor version on."""
    major, minor = torch.cuda.get_device_capability(device)
    info = EXTENSION.build_info()["cuda"]
    if any(arch // 10 == major and arch % 10 <= minor for arch in info["archs"]):
        return None
    if info["ptx"] <= 10 * major + minor:  # the driver compiles it, if it knows that version of PTX
        driver, runtime = CUDA.driver_version(), CUDA.runtime_version()
        if driver >= runtime:
            return None
        return (
            f"{device} has compute capability {major}.{minor}, for which the driver would have to compile PTX of CUDA "
            f"{_version(runtime)}, and it runs CUDA up to {_version(driver)}; CLLM_CUDA_ARCHS={10 * major + minor} at build "
            "time needs no compiling"
        )
    built = ", ".join(f"{arch // 10}.{arch % 10}" for arch in info["archs"])
    return (
        f"{device} has compute capability {major}.{minor}, and the kernels were built for {built} and what is newer "
        f"than {info['ptx'] // 10}.{info['ptx'] % 10}; CLLM_CUDA_ARCHS chooses at build time"
    )


def _cuda_device_reason(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on a device, or None."""
    reason = _cuda_reason()
    if reason is None and device.type != "cuda":
        return f"the tensors are on {device}; it runs on CUDA devices"
    return _coverage_reason(device) if reason is None else reason


@functools.cache
def _report(reason: str) -> None:
    """Says once that the CUDA kernels that were built do not run."""
    warnings.warn(f"the CUDA kernels of cllm_kernels do not run, Triton or torch does: {reason}", stacklevel=2)


def cuda_stream(device: torch.device) -> tuple[int, int]:
    """Index of a CUDA device and address of its current stream."""
    return device.index, torch._C._cuda_getCurrentRawStream(device.index)


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
    return {"cpp": _REASON, "cuda": _cuda_reason(), "triton": _triton_reason(), "torch": None}


@functools.cache
def attention_cell(dim: int, rows: int, capacity: int) -> str:
    """What one entry of the table of measurements is for: sizes up to the next of those that are measured.

    dim: the larger head size; rows: of a cache head, n x Hq / Hkv; capacity: of the cache. Neither batch nor dtype:
    a row's result does not depend on the rows beside it.
    """
    largest = 512
    while largest < capacity:
        largest *= 4
    size = next((size for size in (64, 96, 128) if dim <= size), 256)
    return f"D={size} rows={max(16, 1 << (rows - 1).bit_length())} S={largest}"


@functools.cache
def attention_table(device: torch.device) -> dict[str, str]:
    """The entries for a GPU: "cuda" or "triton" by :func:`attention_cell`.

    Raises ValueError on a file that is not such a table.
    """
    path = os.environ.get("CLLM_ATTENTION_TABLE", str(ATTENTION_TABLE))
    if not path:
        return {}
    try:
        table = json.loads(Path(path).read_text())
        if any(name not in GPU_ORDER[:2] for cells in table.values() for name in cells.values()):
            raise ValueError("an entry is neither 'cuda' nor 'triton'")
    except (OSError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no table of benchmarks/attention_table.py (CLLM_ATTENTION_TABLE): {error}") from error
    return table.get(torch.cuda.get_device_name(device), {})


def _auto_on_gpu(device: torch.device, refusal: str | None, kernels: tuple[str, ...], cell: str | None) -> str:
    order = GPU_ORDER
    if cell is not None and attention_table(device).get(cell, "triton") == "triton":
        order = ("triton", *(name for name in order if name != "triton"))
    for name in order:
        if name == "triton" and name in kernels and not interpreted() and _triton_reason() is None:
            return name
        if name == "cuda" and name in kernels and refusal is None and CUDA is not None:
            reason = _cuda_device_reason(device)
            if reason is None:
                return name
            _report(reason)
    return "torch"


def resolve(
    name: str,
    device: torch.device,
    refusal: str | None = None,
    kernels: tuple[str, ...] = ("cpp", "cuda", "triton"),
    cell: str | None = None,
) -> str:
    """The backend that runs when `name` is asked for with tensors on `device`.

    "auto" takes the environment variable CLLM_BACKEND if it is set. Else, on a CUDA device, it is the first of
    GPU_ORDER that is there: "cuda" where it is built, the driver and the device can run it, and nothing speaks against
    this call, which `refusal` says. On the CPU it is "cpp" where it is there, else "torch".
    kernels: the backends that the op has beside "torch".
    cell: entry of the table of measurements that the call falls into; Triton comes first but where CUDA was as fast.

    Raises ValueError on an unknown name and on "cuda" with a refusal, and RuntimeError on a backend that cannot run,
    with the reason.
    """
    if name == "auto":
        if "CLLM_BACKEND" in os.environ:  # `get` takes three times as long where it is not
            name = os.environ["CLLM_BACKEND"] or "auto"
        if name == "auto":
            if device.type == "cpu":
                return "cpp" if EXTENSION is not None and "cpp" in kernels else "torch"
            return _auto_on_gpu(device, refusal, kernels, cell) if device.type == "cuda" else "torch"
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
    if name == "cuda":
        reason = _cuda_device_reason(device)
        if reason is not None:
            raise RuntimeError(f"backend 'cuda' was asked for but {reason}")
        if refusal is not None:
            raise ValueError(f"backend 'cuda' was asked for but {refusal}")
        return name
    if name == "triton":
        if _triton_reason() is not None:
            raise RuntimeError(f"backend 'triton' was asked for but {_triton_reason()}")
        if device.type != ("cpu" if interpreted() else "cuda"):
            where = "on the CPU, in its interpreter (TRITON_INTERPRET is set)" if interpreted() else "on CUDA devices"
            raise RuntimeError(f"backend 'triton' was asked for but the tensors are on {device}; it runs {where}")
        return name
    allowed = ", ".join(map(repr, ("auto", *NAMES)))
    raise ValueError(f"backend is {name!r}; allowed are {allowed}")
