"""`window_linear`, `window_qkv` and `window_mlp` against their references, on every backend and instruction set."""

from __future__ import annotations

import importlib
import math
import re

import pytest
import torch
from helpers import SPLIT_ROWS, round_alike

from cllm_kernels import backends
from cllm_kernels.ops import window_linear, window_mlp, window_qkv

LINEAR, MLP, QKV = (importlib.import_module(f"cllm_kernels.ops.window_{name}") for name in ("linear", "mlp", "qkv"))
OPS = {"linear": (window_linear, LINEAR.linear_reference), "qkv": (window_qkv, QKV.reference)}
OPS["mlp"] = (window_mlp, MLP.reference)
DTYPES = (torch.float32, torch.bfloat16)
ROW_COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 33, 64, 65, 131, 513)
SHAPES = ((1, 1), (3, 5), (24, 64), (97, 77), (50, 256), (130, 1023))  # (N, K)


@pytest.fixture(autouse=True)
def no_triton(request):
    """These ops have no Triton kernel; test_bad_input checks that it is refused."""
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton":
        pytest.skip("no Triton kernel: these ops run on the CPU")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def without_gradients():
    """Else torch's dispatcher takes each call, not the first ones alone."""
    with torch.no_grad():
        yield


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def make_linear(rows=3, outputs=20, inputs=24, dtype=torch.float32):
    return random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype), random(outputs, dtype=dtype)


def make_qkv(batch=1, width=3, hidden=24, heads=4, kv_heads=2, dim=8, dtype=torch.float32, extras=True):
    angles = 6 * torch.rand(batch, width, dim // 2).repeat(1, 1, 2)
    weights = (random(count * dim, hidden, dtype=dtype) for count in (heads, kv_heads, kv_heads))
    biases = (random(count * dim, dtype=dtype) for count in (heads, kv_heads, kv_heads))
    return (
        random(batch, width, hidden, dtype=dtype), random(hidden, dtype=dtype), 1e-5, *weights, angles.cos().to(dtype),
        angles.sin().to(dtype), *(biases if extras else (None,) * 3),
        *((random(dim, dtype=dtype) for _ in range(2)) if extras else (None,) * 2), 1e-6,
    )  # fmt: skip


def make_mlp(batch=1, width=3, hidden=24, attended=32, inner=40, dtype=torch.float32, extras=True):
    matrices = ((hidden, attended), (inner, hidden), (inner, hidden), (hidden, inner))
    output, gate, up, down = (random(*shape, dtype=dtype) for shape in matrices)
    return (
        random(batch, width, hidden, dtype=dtype), random(batch, width, attended, dtype=dtype), output,
        random(hidden, dtype=dtype), 1e-5, gate, up, down, random(hidden, dtype=dtype) if extras else None,
    )  # fmt: skip


MAKE = {"linear": make_linear, "qkv": make_qkv, "mlp": make_mlp}


def check(name, arguments, backend):
    """max|out - exact| <= 2 max|torch in the same dtype - exact| + a unit, with the exact result in float64.

    The unit is that of the largest result; of a linear layer, that of the largest sum of the terms' absolute values, which
    may cancel.
    """
    op, reference = OPS[name]
    got = op(*arguments, backend=backend)
    base = reference(*arguments)
    exact = reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in arguments))
    if name != "qkv":
        got, base, exact = (got,), (base,), (exact,)
    for mine, torchs, want in zip(got, base, exact, strict=True):
        assert mine.dtype == arguments[0].dtype and mine.is_contiguous() and mine.shape == want.shape
        error, baseline = ((result.double() - want).abs().max() for result in (mine, torchs))
        largest = reference(*(a.double().abs() for a in arguments)) if name == "linear" else want.abs()
        unit = torch.finfo(mine.dtype).eps * largest.max()
        assert error <= 2 * baseline + unit, (error, baseline)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_linear_equals_the_reference(rows, dtype, backend):
    for outputs, inputs in SHAPES:
        x, weight, bias = make_linear(rows, outputs, inputs, dtype)
        check("linear", (x, weight, bias), backend)
        check("linear", (x, weight), backend)


@pytest.mark.parametrize("inputs", [33, 896, 4096])
@pytest.mark.parametrize("spread", [0, 10])
def test_many_rows_of_float32_are_as_close_as_few(spread, inputs, isa):
    """Where they are multiplied in parts too, and of numbers of all sizes."""
    x, weight = random(SPLIT_ROWS, inputs), random(64, inputs)
    for tensor in (x, weight):
        tensor *= 2.0 ** torch.randint(-spread, spread + 1, tensor.shape)
    exact, largest = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    many = window_linear(x, weight, None, "cpp")
    few = torch.cat([window_linear(part, weight, None, "cpp") for part in x.split(4)])
    error, baseline = (((result.double() - exact) / largest).square().mean().sqrt() for result in (many, few))
    assert error <= 2.5 * baseline


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 24, 4, 2, 8, 40), (2, 5, 37, 3, 1, 6, 51), (1, 16, 64, 7, 1, 10, 96), (4, 16, 100, 4, 4, 16, 33),
        (2, 45, 1024, 2, 1, 8, 2048),  # in blocks of rows, which are moved apart
        (3, 345, 24, 3, 1, 6, 17),  # in parts
    ],
)  # fmt: skip
def test_layers_equal_the_reference(sizes, extras, dtype, backend):
    *shape, heads, kv_heads, dim, inner = sizes
    check("qkv", make_qkv(*shape, heads, kv_heads, dim, dtype, extras), backend)
    check("mlp", make_mlp(*shape, heads * dim, inner, dtype, extras), backend)


def single_row(arguments, index, copies):
    """The arguments with batch row 0 and window row `index` alone, where they have one, so many times."""
    width = arguments[0].shape[1]
    return tuple(
        a[:1, index : index + 1].repeat(1, copies, 1)
        if isinstance(a, torch.Tensor) and a.dim() == 3 and a.shape[1] == width
        else a
        for a in arguments
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 3, 5, 8, 16, 17, 64, 99, 200, 1030])
def test_a_row_has_the_same_bits_whatever_stands_beside_it(rows, dtype, backend):
    if backend == "torch":
        pytest.skip("torch's own linear does not promise this")
    copies = 1 if round_alike(dtype, 1, rows) else SPLIT_ROWS
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for outputs, inputs in (*SHAPES, (700, 1500), (30, 4096), (53, 2051)):
                if rows > LINEAR.fast_rows(dtype):
                    continue  # torch's own linear runs
                x, weight, bias = make_linear(rows, outputs, inputs, dtype)
                together = window_linear(x, weight, bias, backend)
                for row in {0, rows // 2, rows - 1}:
                    alone = window_linear(x[row].repeat(copies, 1), weight, bias, backend)
                    assert torch.equal(alone[0], together[row])
                    others = x.clone()
                    others[torch.arange(rows) != row] = math.nan
                    assert torch.equal(window_linear(others, weight, bias, backend)[row], together[row])
            for op, arguments in (
                (window_qkv, make_qkv(1, rows, 37, 3, 1, 6, dtype)),
                (window_mlp, make_mlp(1, rows, 37, 18, 51, dtype)),
                (window_mlp, make_mlp(1, rows, 300, 300, 1100, dtype)),
                (window_mlp, make_mlp(1, rows, 1024, 16, 2048, dtype)),
            ):
                for row in {0, rows // 2, rows - 1}:
                    alone = op(*single_row(arguments, row, copies), backend=backend)
                    together = op(*arguments, backend=backend)
                    pairs = zip(alone, together) if isinstance(alone, tuple) else [(alone, together)]
                    assert all(torch.equal(one[0, 0], all_rows[0, row]) for one, all_rows in pairs)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_the_result(dtype, backend):
    """Enough work that the C++ backend uses them."""
    arguments = {
        "linear": make_linear(16, 1000, 800, dtype),
        "qkv": make_qkv(1, 16, 512, 14, 2, 64, dtype),
        "mlp": make_mlp(1, 16, 512, 896, 1500, dtype),
    }
    for name, (op, _) in OPS.items():
        check(name, arguments[name], backend)
        if backend == "torch":
            continue
        alone = op(*arguments[name], backend=backend)
        torch.set_num_threads(3)
        try:
            shared = op(*arguments[name], backend=backend)
        finally:
            torch.set_num_threads(1)
        pairs = zip(alone, shared) if isinstance(alone, tuple) else [(alone, shared)]
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_what_stands_around_the_weights(dtype, backend):
    """Slices of larger tensors full of NaN, of any alignment."""
    store = torch.full((50, 111), math.nan, dtype=dtype)
    for offset in range(5):
        weight = store[3:23, offset : offset + 77]
        weight.copy_(random(20, 77, dtype=dtype))
        bias = torch.full((40,), math.nan, dtype=dtype)[::2]
        bias.copy_(random(20, dtype=dtype))
        x = torch.full((2, 90, 3), math.nan, dtype=dtype).transpose(1, 2)[..., 5:82]
        x.copy_(random(2, 3, 77, dtype=dtype))
        got = window_linear(x, weight, bias, backend)
        assert got.shape == (2, 3, 20) and got.isfinite().all()
        dense = window_linear(x.contiguous(), weight.clone(), bias.clone(), backend)
        assert torch.equal(got, dense) if backend == "cpp" else torch.allclose(got, dense, rtol=1e-2, atol=1e-1)
        store.fill_(math.nan)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 3, 24), (1, 2, 2, 24), (0, 24), (2, 0, 24)], ids=str)
def test_any_number_of_dimensions(shape, backend):
    x, weight = random(*shape), random(5, 24)
    got = window_linear(x, weight, backend=backend)
    assert got.shape == (*shape[:-1], 5)
    torch.testing.assert_close(got, x @ weight.T)


exchanges = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no DLPack exchange for C"
)


@exchanges
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_cpp_takes_as_tensors(dtype, isa):
    """It has the bits of the way by pointers, and leaves to that what is out of the ordinary."""
    x, weight, bias = make_linear(3, 20, 24, dtype)
    weight.requires_grad_()

    def by_tensors(x, weight, bias, rows=64):
        return backends.EXTENSION.linear_of_tensors(x, weight, bias, rows, 2)

    for some in (x, x[0], x[None], x.view(1, 3, 1, 24)):
        for its_bias in (bias, None):
            got = by_tensors(some, weight, its_bias)
            assert got.shape == (*some.shape[:-1], 20) and got.dtype == dtype and not got.requires_grad
            assert torch.equal(got, LINEAR._implementation(some, weight, its_bias, "cpp"))
    wide = torch.zeros(40, 24, dtype=dtype)[::2]
    wide.copy_(weight)
    assert torch.equal(by_tensors(x, wide, None), by_tensors(x, weight, None))

    left = {
        "strided x": (x.T.contiguous().T, weight, bias),
        "strided bias": (x, weight, random(40, dtype=dtype)[::2]),
        "a column": (x, random(24, 20, dtype=dtype).T, bias),
        "many rows": (random(65, 24, dtype=dtype), weight, bias),
        "no rows": (x[:0], weight, bias),
        "a number": (x[0, 0], weight, bias),
        "other dtypes": (x.half(), weight, bias),
        "another dtype": (x, weight.double(), bias),
        "another dtype of the bias": (x, weight, bias.half()),
        "wrong shapes": (x, weight[:, 1:], bias),
        "a wrong bias": (x, weight, bias[1:]),
        "a vector": (x, weight[0], bias),
        "meta": (x, weight.to("meta"), bias),
        "no tensor": (x, "weight", bias),
    }
    assert [name for name, arguments in left.items() if by_tensors(*arguments) is not None] == []


@exchanges
def test_what_cpp_takes_as_tensors_minds_the_variable(monkeypatch):
    arguments = (*make_linear(), 64, 2)
    monkeypatch.delenv("CLLM_BACKEND", raising=False)
    assert backends.EXTENSION.linear_of_tensors(*arguments) is not None
    monkeypatch.setenv("CLLM_BACKEND", "torch")
    assert backends.EXTENSION.linear_of_tensors(*arguments) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_show_where_they_belong(dtype, value, backend):
    x, weight, _ = make_linear(5, 30, 77, dtype)
    weight.abs_()
    x[2, 76] = value
    got = window_linear(x, weight, backend=backend)
    assert torch.equal(got[2].isfinite(), torch.zeros(30, dtype=torch.bool))
    assert got[[0, 1, 3, 4]].isfinite().all()
    arguments = make_mlp(1, 5, 24, 32, 40, dtype)
    arguments[0][0, 2, 3] = value
    got = window_mlp(*arguments, backend=backend)
    assert got[0, 2].isnan().any() and got[0, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_gates(dtype, backend):
    """silu far from zero is x or 0, not NaN."""
    x = torch.ones(1, 4, 1, dtype=dtype)
    attended = torch.tensor([0.0, 1.0, -2.0, 3.0], dtype=dtype).view(1, 4, 1)
    one = torch.ones(1, 1, dtype=dtype)
    for size in (50.0, 1e4, 1e30):
        arguments = (x, attended, one, torch.ones(1, dtype=dtype), 0.0, one * size, one, one)
        check("mlp", arguments, backend)
        check("mlp", (*arguments[:5], -one * size, *arguments[6:]), backend)


BAD_LINEAR = {
    "x has shape (); it must be": {"x": torch.ones(())},
    "x has dtype torch.float16; allowed are float32 and bfloat16": {"x": torch.ones(3, 24).half()},
    "weight has shape (20, 24); it must be [N, 23]": {"x": torch.ones(3, 23)},
    "weight has shape (24,); it must be": {"weight": torch.ones(24)},
    "weight has dtype torch.bfloat16": {"weight": torch.ones(20, 24).bfloat16()},
    "weight has strides": {"weight": torch.ones(24, 20).T},
    "weight is on meta": {"weight": torch.ones(20, 24, device="meta")},
    "the bias of weight has shape (19,); it must be (20,)": {"bias": torch.ones(19)},
    "the bias of weight has dtype torch.float64": {"bias": torch.ones(20).double()},
    "backend is 'x'; allowed": {"backend": "x"},
}
BAD_QKV = {
    "x has shape (3, 24); it must be [B, n, H]": {0: torch.ones(3, 24)},
    "x has shape (1, 0, 24); B, n and H must be at least 1": {0: torch.ones(1, 0, 24)},
    "x has dtype torch.float64": {0: torch.ones(1, 3, 24).double()},
    "norm has shape (23,)": {1: torch.ones(23)},
    "query has shape (32, 23)": {3: torch.ones(32, 23)},
    "have 31, 16 and 16 outputs": {3: torch.ones(31, 24), 8: None},
    "have 32, 16 and 8 outputs": {5: torch.ones(8, 24), 10: None},
    "sin has shape (1, 3, 4)": {7: torch.ones(1, 3, 4)},
    "the bias of key has shape": {9: torch.ones(3)},
    "key_norm has shape (7,)": {12: torch.ones(7)},
}
BAD_MLP = {
    "attended has shape (1, 2, 32)": {1: torch.ones(1, 2, 32)},
    "attended has dtype": {1: torch.ones(1, 3, 32).double()},
    "output has shape (23, 32); it must be (24, 32)": {2: torch.ones(23, 32), 8: None},
    "up has shape (39, 24); it must be (40, 24)": {6: torch.ones(39, 24)},
    "down has shape (25, 40); it must be (24, 40)": {7: torch.ones(25, 40)},
    "gate has strides": {5: torch.ones(24, 40).T},
}


def raises(message):
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize("message", BAD_LINEAR)
def test_bad_linear(message, backend):
    names = ("x", "weight", "bias")
    with raises(message):
        window_linear(**dict(zip(names, make_linear())) | {"backend": backend} | BAD_LINEAR[message])


@pytest.mark.parametrize(("make", "op", "table"), [(make_qkv, window_qkv, BAD_QKV), (make_mlp, window_mlp, BAD_MLP)])
def test_bad_layers(make, op, table, backend):
    for message, changes in table.items():
        arguments = list(make())
        for index, value in changes.items():
            arguments[index] = value
        with raises(message):
            op(*arguments, backend=backend)


@pytest.mark.parametrize("name", OPS)
def test_triton_is_refused(name, monkeypatch):
    monkeypatch.setattr(backends, "resolve", lambda backend, device: backend)
    with pytest.raises(RuntimeError, match="backend 'triton' was asked for but this op runs on the CPU alone"):
        OPS[name][0](*MAKE[name](), backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, dtype, backend):
    overload = getattr(torch.ops.cllm_kernels, f"window_{name}").default
    torch.library.opcheck(overload, MAKE[name](dtype=dtype), {"backend": backend})
