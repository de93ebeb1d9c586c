"""Every test of an op that takes `backend` runs on each backend, and C++ on each instruction set of this CPU.

Triton's kernels run in its interpreter here (tests/conftest.py), and the CUDA sources, compiled for the host, under the
emulation of cuda_emulation/; on a GPU, test_ops_on_gpu.py runs both.
"""

import contextlib
import os

import emulated_cuda
import pytest
import torch

from cllm_kernels import backends
from cllm_kernels.ops import _tickets

ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")


@contextlib.contextmanager
def instruction_set(isa):
    extension = backends.EXTENSION
    if isa not in extension.cpu_isas():
        pytest.skip(f"this CPU has no {isa} (or the build lacks it): {', '.join(extension.cpu_isas())}")
    before = extension.cpu_isa()
    extension.select_cpu_isa(isa)
    assert extension.cpu_isa() == isa
    yield
    extension.select_cpu_isa(before)


@pytest.fixture(params=["torch", "triton", "cuda-emulated", *(f"cpp-{isa}" for isa in ISAS)])
def backend(request):
    name, _, isa = request.param.partition("-")
    if name == "cuda":
        if "block_attention" in request.node.path.name and request.getfixturevalue("dtype") == torch.float32:
            pytest.skip("backend cuda takes no float32 here")
        request.getfixturevalue("emulation")
        yield name
        return
    reason = backends.available()[name]
    if reason is not None:
        pytest.skip(reason)
    if name == "triton" and torch.cuda.is_available():
        pytest.skip("compiled for the GPU here, see test_ops_on_gpu.py")
    if name != "cpp":
        yield name
        return
    with instruction_set(isa):
        yield name


@pytest.fixture(params=ISAS)
def isa(request):
    """C++ on each instruction set, for ops of which `backend` leaves it out."""
    reason = backends.available()["cpp"]
    if reason is not None:
        pytest.skip(reason)
    with instruction_set(request.param):
        yield request.param


@pytest.fixture(scope="session")
def emulated_module():
    if emulated_cuda.reason() is not None:
        pytest.skip(emulated_cuda.reason())
    return emulated_cuda.load(emulated_cuda.build(sanitize=os.environ.get("CLLM_EMULATION_SANITIZE") == "1"))


@pytest.fixture
def emulation(emulated_module, monkeypatch):
    """Backend "cuda" takes tensors on the CPU and runs under the emulation."""
    monkeypatch.setattr(backends, "CUDA", emulated_module)
    monkeypatch.setattr(backends, "_cuda_device_reason", lambda device: None)
    monkeypatch.setattr(backends, "cuda_stream", lambda device: (0, 0))
    yield
    assert not any(counters.any() for counters in _tickets._COUNTERS.values())
    _tickets._COUNTERS.clear()


@pytest.fixture
def dtype(request):
    """Of tests that run in one dtype only: one that the backend takes."""
    return torch.bfloat16 if "cuda-emulated" in request.node.name else torch.float32


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` gives NaN, so that what an op leaves unwritten shows."""
    # Some of torch's own operations on a GPU, cuBLAS for one, are not made for it; they would only raise.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)
