"""rms_norm, add_rms_norm and silu_mul against transformers' modules and float64, in Triton's interpreter and PyTorch; and
rms_norm in C++."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cllm_kernels.ops import add_rms_norm, rms_norm, silu_mul
from cllm_kernels.ops.rms_norm import MAX_SIZE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 64), (2, 3, 896), (5, 8), (1, 2, 4, 128), (3, 1, 5000), (2, 0, 16))


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def assert_near(got, exact, dtype, roundings):
    """Relative to the exact result, with so many roundings to the dtype."""
    assert got.dtype == dtype
    error = (got.double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps * (roundings / 2 + 0.05) * (3 if dtype == torch.float32 else 1) + 1e-7).all()


def exact_norm(x, weight, eps):
    x = x.double()
    return weight.double() * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(shape, dtype, backend):
    torch.manual_seed(len(shape))
    x, weight = 3 * torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    module = LlamaRMSNorm(shape[-1], 1e-5)
    module.weight = nn.Parameter(weight, requires_grad=False)
    got = rms_norm(x, weight, 1e-5, backend)
    assert got.shape == x.shape and got.is_contiguous()
    assert_near(got, exact_norm(x, weight, 1e-5), dtype, 2)
    if backend == "torch":
        assert torch.equal(got, module(x))
    elif dtype != torch.float32 and x.numel():  # another order of the sum seldom shows
        assert (got == module(x)).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_in_cpp(shape, dtype, isa):
    torch.manual_seed(len(shape))
    x, weight = 3 * torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype), torch.randn(shape[-1]).to(dtype)
    x = x[..., : shape[-1]]  # not contiguous
    got = rms_norm(x, weight, 1e-5, "cpp")
    assert got.shape == x.shape and got.is_contiguous() and torch.equal(got, rms_norm(x, weight, 1e-5))
    assert_near(got, exact_norm(x, weight, 1e-5), dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_addition_and_norm(shape, dtype, backend):
    torch.manual_seed(1)
    x, delta, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    before = x.clone()
    total, normed = add_rms_norm(x, delta, weight, 1e-6, backend)
    assert torch.equal(total, x + delta) and torch.equal(x, before)
    assert torch.equal(normed, rms_norm(total, weight, 1e-6, backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activation(shape, dtype, backend):
    torch.manual_seed(2)
    gate, up = 4 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    got = silu_mul(gate, up, backend)
    assert got.shape == gate.shape
    assert_near(got, nn.functional.silu(gate.double()) * up.double(), dtype, 2)
    if dtype != torch.float32 and gate.numel():
        assert (got == nn.functional.silu(gate) * up).float().mean() > 0.99


def test_numbers_that_are_not_finite(backend):
    gate = torch.tensor([float("inf"), float("-inf"), float("nan"), -200.0, 200.0])
    torch.testing.assert_close(
        silu_mul(gate, torch.ones(5), backend), nn.functional.silu(gate), equal_nan=True, atol=0, rtol=1e-6
    )
    assert rms_norm(torch.tensor([[1.0, float("nan")]]), torch.ones(2), 0.0, backend).isnan().all()


def test_strided(backend):
    store = torch.randn(4, 6, 32)
    x, delta = store[:, 1:3, :16], store[:, 3:5, 16:]
    weight = torch.randn(16, 2)[:, 1]
    total, normed = add_rms_norm(x, delta, weight, 1e-5, backend)
    assert torch.equal(total, x + delta)
    torch.testing.assert_close(normed, exact_norm(total, weight, 1e-5).float())
    torch.testing.assert_close(silu_mul(x, delta, backend), nn.functional.silu(x) * delta)


BAD = {
    "x has dtype torch.int64": lambda: rms_norm(torch.zeros(2, 4, dtype=torch.int64), torch.ones(4), 1e-5),
    r"x has shape \(2, 0\); it must be \[..., H\]": lambda: rms_norm(torch.zeros(2, 0), torch.ones(0), 1e-5),
    f"from 1 to {MAX_SIZE}": lambda: rms_norm(torch.zeros(1, MAX_SIZE + 1), torch.ones(MAX_SIZE + 1), 1e-5),
    r"weight has shape \(3,\); it must be \(4,\)": lambda: rms_norm(torch.zeros(2, 4), torch.ones(3), 1e-5),
    "weight has dtype torch.float16": lambda: rms_norm(torch.zeros(2, 4), torch.ones(4).half(), 1e-5),
    r"delta has shape \(4,\)": lambda: add_rms_norm(torch.zeros(2, 4), torch.zeros(4), torch.ones(4), 1e-5),
    "delta is on meta": lambda: add_rms_norm(torch.zeros(2, 4), torch.zeros(2, 4, device="meta"), torch.ones(4), 1e-5),
    r"up has shape \(2, 3\)": lambda: silu_mul(torch.zeros(2, 4), torch.zeros(2, 3)),
    "up has dtype torch.float16": lambda: silu_mul(torch.zeros(2), torch.zeros(2).half()),
    "backend is ''": lambda: silu_mul(torch.zeros(2), torch.zeros(2), ""),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_a_backend_without_such_a_kernel():
    with pytest.raises(RuntimeError, match="no such kernel; allowed are 'auto', 'triton', 'torch'"):
        rms_norm(torch.zeros(2, 4).half(), torch.ones(4).half(), 1e-5, "cpp")
    with pytest.raises(RuntimeError, match="no such kernel; allowed are 'auto', 'triton', 'torch'"):
        add_rms_norm(torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(4), 1e-5, "cpp")


def test_opcheck(backend):
    ops, x = torch.ops.cllm_kernels, torch.randn(2, 3, 8)
    torch.library.opcheck(ops.rms_norm.default, (x, torch.ones(8), 1e-5, backend))
    torch.library.opcheck(ops.add_rms_norm.default, (x, x.clone(), torch.ones(8), 1e-5, backend))
    torch.library.opcheck(ops.silu_mul.default, (x, x.clone(), backend))
