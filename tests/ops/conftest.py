"""Every test of an op that takes `backend` runs on each backend, and C++ on each instruction set of this CPU.

Triton's kernels run in its interpreter here (tests/conftest.py); on a GPU, test_ops_on_gpu.py runs them.
"""

import pytest
import torch

from cllm_kernels import backends

ISAS = ("baseline", "avx2", "avx512", "avx512bf16")


@pytest.fixture(params=["torch", "triton", *(f"cpp-{isa}" for isa in ISAS)])
def backend(request):
    name, _, isa = request.param.partition("-")
    reason = backends.available()[name]
    if reason is not None:
        pytest.skip(reason)
    if name == "triton" and torch.cuda.is_available():
        pytest.skip("compiled for the GPU here, see test_ops_on_gpu.py")
    if name != "cpp":
        yield name
        return
    extension = backends.EXTENSION
    if isa not in extension.cpu_isas():
        pytest.skip(f"this CPU has no {isa} (or the build lacks it): {', '.join(extension.cpu_isas())}")
    before = extension.cpu_isa()
    extension.select_cpu_isa(isa)
    assert extension.cpu_isa() == isa
    yield name
    extension.select_cpu_isa(before)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` gives NaN, so that what an op leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
