"""The C++ kernels read nothing behind their inputs, which end where a page without access begins.

Sanitizers do not see what instructions on tiles read. A read behind the end is a segmentation fault here.
"""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

from cllm_kernels.ops import block_attention, window_linear, window_mlp

PAGE = mmap.PAGESIZE


@pytest.fixture
def at_the_end():
    """Copies a tensor to where a page without access follows."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

    def copy(tensor):
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, pages + PAGE)
        last = ctypes.addressof(ctypes.c_char.from_buffer(memory, pages))
        assert libc.mprotect(last, PAGE, 0) == 0
        values = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size)
        return values.view(tensor.shape).copy_(tensor)

    return copy


@pytest.fixture(autouse=True)
def native_alone(request):
    if not request.node.callspec.params["backend"].startswith("cpp"):
        pytest.skip("about the C++ kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 33])
def test_linear(rows, dtype, backend, at_the_end):
    for outputs in (1, 7, 16, 31, 50):
        for inputs in (1, 31, 32, 33, 77, 1050):
            x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
            want = window_linear(x, weight, bias, backend)
            assert torch.equal(window_linear(*map(at_the_end, (x, weight, bias)), backend), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 33, 70])
def test_mlp(rows, dtype, backend, at_the_end):
    for hidden, inner in ((31, 40), (64, 33), (77, 64), (24, 7)):
        shapes = (1, rows, hidden), (1, rows, 16), (hidden, 16), (hidden,), (inner, hidden), (inner, hidden), (hidden, inner)
        tensors = [torch.randn(*shape).to(dtype) for shape in shapes]

        def run(x, attended, output, norm, gate, up, down):
            return window_mlp(x, attended, output, norm, 1e-6, gate, up, down, backend=backend)

        assert torch.equal(run(*map(at_the_end, tensors)), run(*tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [0, 1, 15, 30, 64, 600])
def test_attention(length, dtype, backend, at_the_end):
    for dim, value_dim, width in ((32, 16, 1), (64, 64, 5), (96, 48, 16), (80, 24, 33)):
        tensors = [torch.randn(1, width, 4, dim), *(torch.randn(1, 2, length + width, size) for size in (dim, value_dim))]
        query, keys, values = (tensor.to(dtype) for tensor in tensors)
        bounds = torch.tensor([[length], [0]], dtype=torch.int32)
        want, _ = block_attention(query, keys, values, *bounds, backend=backend)
        got, _ = block_attention(*map(at_the_end, (query, keys, values)), *bounds, backend=backend)
        assert torch.equal(got, want)
