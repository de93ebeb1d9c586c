import math

import pytest
import torch
import torch.nn.functional as F
from helpers import SPLIT_ROWS, round_alike

from cllm_kernels import backends
from cllm_kernels.ops import lm_head_argmax, window_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDED = ({"scale": 0.0625}, {"scale": 0.3}, {"softcap": 30.0}, {"scale": 0.7, "softcap": 5.0})


@pytest.fixture(autouse=True)
def kernels(request):
    """There is none for CUDA, and that for CPUs takes no float16; test_backends checks that it says so."""
    name = request.node.name
    if "cuda-emulated" in name or ("cpp" in name and "torch.float16" in name):
        pytest.skip("no such kernel")


def integers(*shape, dtype):
    """Small integers, whose sums of products are exact in every order, with many ties."""
    return torch.randint(-2, 3, shape).to(dtype)


def wanted(hidden, weight, bias=None, scale=1.0, softcap=0.0):
    """Python's index of the first maximum, of logits from exact sums that are rounded after each operation."""
    exact = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    logits = exact.float().to(hidden.dtype)
    if scale != 1.0:
        logits = logits * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    lists = logits.float().flatten(0, 1).tolist()
    index = [values.index(max(values)) for values in lists]
    shape = hidden.shape[:2]
    return torch.tensor(index).reshape(shape), torch.tensor([max(values) for values in lists]).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "width", "size", "vocabulary"),
    [(1, 1, 1, 1), (1, 2, 33, 5), (2, 8, 64, 129), (1, 16, 100, 300), (3, 11, 70, 257), (2, 32, 65, 150),
     (1, 128, 48, 140), (3, 47, 40, 70)],
    ids=str,
)  # fmt: skip
def test_ties_break_to_the_lowest_index(batch, width, size, vocabulary, dtype, backend):
    hidden, weight = integers(batch, width, size, dtype=dtype), integers(vocabulary, size, dtype=dtype)
    index, value = lm_head_argmax(hidden, weight, backend=backend)
    want = wanted(hidden, weight)
    assert index.dtype == torch.int64 and value.dtype == torch.float32
    assert torch.equal(index, want[0]) and torch.equal(value, want[1])


@pytest.mark.parametrize("options", ROUNDED, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_rounds_after_every_operation(dtype, with_bias, options, backend):
    """Logits beyond the dtype's exact integers, so that what is rounded, and when, decides about ties."""
    hidden, weight = 8 * integers(2, 9, 200, dtype=dtype), 4 * integers(400, 200, dtype=dtype)
    bias = torch.randint(-64, 64, (400,)).to(dtype) if with_bias else None
    index, value = lm_head_argmax(hidden, weight, bias, **options, backend=backend)
    want = wanted(hidden, weight, bias, **options)
    assert torch.equal(index, want[0]) and torch.equal(value, want[1])


@pytest.mark.parametrize("options", [{}, {"scale": -0.3}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_numbers(dtype, options, backend):
    """The value within the rounding of the unfused path, and the index one whose exact logit is as close."""
    hidden, weight = torch.randn(2, 5, 96).to(dtype), torch.randn(500, 96).to(dtype)
    bias = torch.randn(500).to(dtype)
    index, value = lm_head_argmax(hidden, weight, bias, **options, backend=backend)
    exact = F.linear(hidden.double(), weight.double(), bias.double()) * options.get("scale", 1.0)
    plain = F.linear(hidden, weight, bias) * options.get("scale", 1.0)
    if cap := options.get("softcap"):
        exact, plain = torch.tanh(exact / cap) * cap, torch.tanh(plain / cap) * cap
    bound = 2 * (plain.double() - exact).abs().max() + 1e-6
    assert (value.double() - exact.amax(-1)).abs().max() <= bound
    assert (exact.gather(-1, index[..., None])[..., 0] - exact.amax(-1)).abs().max() <= bound


def test_strides(backend):
    """The last tokens of a longer sequence, and a weight and a bias that lie apart in memory."""
    hidden = integers(2, 9, 40, dtype=torch.float32)[:, 5:, :32]
    weight = integers(70, 80, dtype=torch.float32)[::2, 8:40]
    want = wanted(hidden, weight)
    index, value = lm_head_argmax(hidden, weight, backend=backend)
    assert torch.equal(index, want[0]) and torch.equal(value, want[1]) and index.is_contiguous()


def test_nothing_behind_the_tensors_is_read(backend):
    store = torch.full((60, 50), math.nan)
    weight = store[3:40, 5:38]
    weight.copy_(integers(37, 33, dtype=torch.float32))
    around = torch.full((4, 7, 50), math.nan)
    hidden = around[1:3, 2:5, 9:42]
    hidden.copy_(integers(2, 3, 33, dtype=torch.float32))
    index, value = lm_head_argmax(hidden, weight, backend=backend)
    want = wanted(hidden, weight)
    assert torch.equal(index, want[0]) and torch.equal(value, want[1])


@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "softcap": 2.0}], ids=str)
def test_nan_and_infinity(options, backend):
    columns = torch.randn(4, 300, 1)
    columns[0, 200], columns[0, 260], columns[1, 299] = math.nan, math.nan, math.inf
    columns[2], columns[3] = -math.inf, -0.0
    largest = [(200, math.nan), (299, math.inf), (0, -math.inf), (0, 0.0)]
    for weight, (index, value) in zip(columns, largest, strict=True):
        got = lm_head_argmax(torch.ones(1, 1, 1), weight, **options, backend=backend)
        if options and math.isinf(value):
            value = math.copysign(2.0, value)
        assert got[0].item() == index
        assert got[1].item() == value or math.isnan(value) and math.isnan(got[1].item())


def test_more_than_one_step_of_the_join(backend):
    hidden, weight = torch.ones(1, 2, 1), torch.zeros(1024 * 64 + 3, 1)
    weight[[65000, 65538, 70]] = 1.0
    weight[:, 0] *= 3
    assert lm_head_argmax(hidden, weight, backend=backend)[0].tolist() == [[70, 70]]
    weight[70] = 0
    weight[65538] = 4
    index, value = lm_head_argmax(hidden, weight, backend=backend)
    assert index.tolist() == [[65538, 65538]] and value.tolist() == [[4.0, 4.0]]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_tokens(shape, backend):
    index, value = lm_head_argmax(torch.zeros(*shape, 8), torch.zeros(5, 8), backend=backend)
    assert index.shape == value.shape == shape


BAD = {
    r"hidden has shape \(4, 8\)": lambda a: {"hidden": a["hidden"][0]},
    r"weight has shape \(9, 7\); it must be \(9, 8\)": lambda a: {"weight": a["weight"][:, :7]},
    r"weight has shape \(8,\)": lambda a: {"weight": a["weight"][0]},
    r"weight has shape \(0, 8\); V and H must be at least 1": lambda a: {"weight": a["weight"][:0]},
    "weight has dtype torch.bfloat16": lambda a: {"weight": a["weight"].bfloat16()},
    "hidden has dtype torch.int64": lambda a: {"hidden": a["hidden"].long()},
    "hidden has strides": lambda a: {"hidden": torch.zeros(2, 8, 4).transpose(1, 2)},
    "weight has strides": lambda a: {"weight": torch.zeros(8, 9).T},
    r"bias has shape \(8,\)": lambda a: {"bias": torch.zeros(8)},
    "bias has dtype": lambda a: {"bias": torch.zeros(9).half()},
    "weight is on meta": lambda a: {"weight": a["weight"].to("meta")},
    "scale is nan": lambda a: {"scale": math.nan},
    "softcap is -1": lambda a: {"softcap": -1.0},
    "softcap is inf": lambda a: {"softcap": math.inf},
    "backend is 'x'": lambda a: {"backend": "x"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, backend):
    arguments = {"hidden": torch.zeros(2, 4, 8), "weight": torch.zeros(9, 8), "backend": backend}
    with pytest.raises(ValueError, match=message):
        lm_head_argmax(**arguments | BAD[message](arguments))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_logits_are_those_of_window_linear(threads, dtype, backend):
    """Bit for bit, alone and beside other rows, however the outputs are shared out."""
    if backend != "cpp":
        pytest.skip("other backends add up in another order")
    hidden, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((2, 9, 200), (3001, 200), (3001,)))
    logits = window_linear(hidden, weight, bias, backend).float()
    torch.set_num_threads(threads)
    try:
        index, value = lm_head_argmax(hidden, weight, bias, backend=backend)
        assert torch.equal(value, logits.amax(-1)) and torch.equal(index, logits.argmax(-1))
        copies = 1 if round_alike(dtype, 1, 18) else SPLIT_ROWS
        alone = lm_head_argmax(hidden[1:, 4:5].repeat(1, copies, 1), weight, bias, backend=backend)
        assert torch.equal(alone[0][0, 0], index[1, 4]) and torch.equal(alone[1][0, 0], value[1, 4])
    finally:
        torch.set_num_threads(1)


def test_backends(monkeypatch):
    arguments = torch.ones(1, 2, 3), torch.ones(4, 3)
    monkeypatch.delenv("CLLM_BACKEND", raising=False)
    assert lm_head_argmax(*arguments)[0].tolist() == [[0, 0]]
    assert lm_head_argmax(*(tensor.half() for tensor in arguments))[0].tolist() == [[0, 0]]
    with pytest.raises(RuntimeError, match="'cuda' was asked for but this op has no such kernel; .* 'cpp', 'triton'"):
        lm_head_argmax(*arguments, backend="cuda")
    if backends.EXTENSION is not None:
        with pytest.raises(ValueError, match="'cpp' was asked for but it takes no torch.float16"):
            lm_head_argmax(*(tensor.half() for tensor in arguments), backend="cpp")


def test_opcheck(backend):
    hidden, weight, bias = torch.randn(2, 3, 16), torch.randn(40, 16), torch.randn(40)
    op = torch.ops.cllm_kernels.lm_head_argmax.default
    torch.library.opcheck(op, (hidden, weight, None, 1.0, 0.0, backend))
    torch.library.opcheck(op, (hidden, weight, bias, 0.5, 20.0, backend))
