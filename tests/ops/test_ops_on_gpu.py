"""The kernels as a GPU runs them, against the reference on the CPU. Interpreter and emulation show their logic, not this.

CLLM_TEST_DEVICE=cpu runs what needs no GPU under these two, which shows that the tests themselves work.
"""

import math
import os

import pytest
import torch
from test_append_kv import make_angles
from test_block_attention import ATOL, DTYPES, check_far_rows, expected, expected_branches, make, reference
from test_converge import agreeable_logits, assert_state, oracle, random_state
from test_lm_head_argmax import ROUNDED, integers, wanted

from cllm_kernels import backends
from cllm_kernels.ops import (
    JacobiState, add_rms_norm, append_kv_, block_attention, converge_, lm_head_argmax, rms_norm, silu_mul,
)  # fmt: skip
from cllm_kernels.ops.philox import gumbel, noise_words
from cllm_kernels.ops.rms_norm import reference as reference_norm
from cllm_kernels.ops.state_fields import FIELDS

DEVICE = torch.device(os.environ.get("CLLM_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="there is no GPU")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="this needs a GPU")
# The tensor cores of backend "cuda" have no float32; Triton compiles every case anew, which takes time.
KERNELS = [("cuda", torch.bfloat16), ("cuda", torch.float16), ("triton", torch.bfloat16), ("triton", torch.float32)]


def of_kernel(value):
    return "-".join(map(str, value)) if isinstance(value, tuple) else None


@pytest.fixture
def available(request):
    """Makes a backend available, or skips."""

    def see(name):
        if name == "cuda" and not ON_GPU:
            request.getfixturevalue("emulation")
        elif backends.available()[name] is not None:
            pytest.skip(backends.available()[name])
        return name

    return see


@pytest.fixture(params=["cuda", "triton", "torch"])
def gpu_backend(request, available):
    return available(request.param)


@pytest.fixture(params=KERNELS, ids=of_kernel)
def kernel(request, available):
    """Backend and dtype of block_attention."""
    return available(request.param[0]), request.param[1]


def to_gpu(state, device=DEVICE):
    return JacobiState(*(tensor.to(device, copy=True) for tensor in state.tensors()))


def check(kernel, options=None, **case):
    options = options or {}
    case = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in case.items())
    arguments, out, lse, error = expected((*case, ("dtype", kernel[1])), tuple(options.items()))
    on_gpu = [tensor.to(DEVICE) for tensor in arguments]
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        got_out, got_lse = block_attention(*on_gpu, backend=kernel[0], **options)
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    assert (got_out.cpu().double() - out).abs().max().item() <= 2 * error + ATOL
    torch.testing.assert_close(got_lse.cpu().double(), lse, rtol=1e-5, atol=2 * ATOL)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 12, "softcap": 3.0}], ids=["plain", "window-cap"])
@pytest.mark.parametrize("length", [1, 1300])
@pytest.mark.parametrize("group", [1, 7])
def test_branches(kernel, group, length, options):
    backend, dtype = kernel
    arguments, out, lse, error = expected_branches(2 * group, 36, 9, length, tuple(options.items()), dtype)
    on_gpu = [tensor.to(DEVICE) for tensor in arguments]
    got_out, got_lse = block_attention(*on_gpu, branch=9, backend=backend, **options)
    assert (got_out.cpu().double() - out).abs().max().item() <= 2 * error + ATOL
    torch.testing.assert_close(got_lse.cpu().double(), lse, rtol=1e-5, atol=2 * ATOL)


@needs_gpu
def test_auto_follows_the_order():
    device = torch.device("cuda", 0)
    assert backends.resolve("auto", device) == next(name for name in backends.GPU_ORDER if backends.available()[name] is None)


GRID = [(width, group, 799) for width in (1, 2, 16, 17, 64, 128) for group in (1, 4, 7, 8)]
GRID += [(width, 7, length) for width in (1, 16, 128) for length in (0, 1, 63, 20000)]


@pytest.mark.parametrize(("width", "group", "length"), GRID)
def test_grid(kernel, width, group, length):
    check(kernel, heads=2 * group, kv_heads=2, width=width, lengths=[length, length // 3], starts=[0, length // 5], dim=64)


@pytest.mark.parametrize("dims", [(8, 8), (13, 5), (64, 128), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("width", [2, 16, 64])
def test_head_sizes(kernel, width, dims):
    check(kernel, heads=8, kv_heads=2, width=width, lengths=[700, 3], dim=dims[0], value_dim=dims[1])


@pytest.mark.parametrize(
    "options",
    [{"scale": 0.3}, {"sliding_window": 7}, {"sliding_window": 1000}, {"softcap": 2.0}, {"softcap": 30.0, "sliding_window": 20}],
    ids=str,
)
@pytest.mark.parametrize("width", [1, 16, 333])
def test_options(kernel, width, options):
    check(kernel, options, heads=6, kv_heads=2, width=width, lengths=[1300, 40], starts=[0, 3], dim=64)


@pytest.mark.parametrize("width", [2, 8, 16, 64])
@pytest.mark.parametrize("dim", [64, 256])
def test_sanitized(kernel, dim, width):
    """A few small cases that reach every tile, for compute-sanitizer too: two rows, one short, over several splits."""
    check(kernel, {"sliding_window": 400}, heads=6, kv_heads=2, width=width, lengths=[700, 3], starts=[0, 1], dim=dim)


@pytest.mark.parametrize("length", [5, 1200])
def test_sinks(kernel, length):
    arguments = make(6, 2, 4, [length, 2], dtype=kernel[1])
    sinks = torch.tensor([-1.0, 0.0, 3.0, -math.inf, 20.0, 0.5])
    out, lse = reference(*arguments, sinks=sinks, dtype=torch.float64)
    got, got_lse = block_attention(*(x.to(DEVICE) for x in arguments), sinks=sinks.to(DEVICE), backend=kernel[0])
    tolerance = 1e-4 if kernel[1] == torch.float32 else 1e-2
    torch.testing.assert_close(got.cpu().double(), out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got_lse.cpu().double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width", [2, 8, 16])
def test_later_rows_of_the_window_are_not_read(kernel, width, poison):
    seen = width // 2
    query, keys, values, lengths, starts = (x.to(DEVICE) for x in make(8, 2, width, [700, 7], dtype=kernel[1]))
    clean, _ = block_attention(query, keys, values, lengths, starts, backend=kernel[0])
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, length + seen] = poison
        values[row, :, length + seen] = poison
    out, _ = block_attention(query, keys, values, lengths, starts, backend=kernel[0])
    assert torch.equal(out[:, :seen], clean[:, :seen])
    assert not out[:, seen:].isfinite().any(-1).any() or not math.isnan(poison)


def test_rows_do_not_depend_on_the_batch(kernel):
    arguments = [x.to(DEVICE) for x in make(8, 2, 16, [20000, 700, 31], dtype=kernel[1])]
    want, _ = block_attention(*arguments, backend=kernel[0])
    for row in range(3):
        one = [x[row : row + 1] for x in arguments]
        assert torch.equal(block_attention(*one, backend=kernel[0])[0], want[row : row + 1])


@needs_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_rows_more_than_2_to_the_31_elements_away(backend, available):
    check_far_rows(available(backend), DEVICE)


@needs_gpu
def test_float32_is_refused_and_auto_takes_triton(available):
    available("cuda")
    arguments = [x.to(DEVICE) for x in make(8, 2, 4, [30])]
    with pytest.raises(ValueError, match="'cuda' was asked for but the tensors are float32"):
        block_attention(*arguments, backend="cuda")
    auto, triton = (block_attention(*arguments, backend=name)[0] for name in ("auto", "triton"))
    assert torch.equal(auto, triton)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append(dtype, gpu_backend):
    lengths = torch.tensor([0, 17, 44], dtype=torch.int32, device=DEVICE)
    caches = [torch.zeros(3, 2, 60, dim, dtype=dtype, device=DEVICE) for dim in (24, 40)]
    window = [torch.randn(3, 16, 2, dim, device=DEVICE).to(dtype).transpose(1, 2) for dim in (24, 40)]
    append_kv_(*caches, *window, lengths, backend=gpu_backend)
    for cache, new in zip(caches, window, strict=True):
        want = torch.zeros_like(cache)
        for row, length in enumerate(lengths.tolist()):
            want[row, :, length : length + 16] = new[row]
        assert torch.equal(cache, want)


@pytest.mark.parametrize(("dtype", "wide"), [(d, wide) for d in DTYPES for wide in (False, True)], ids=str)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 32), (128, 128), (33, 18)])
def test_append_rotates_as_on_the_cpu(dim, rotary, dtype, wide, gpu_backend):
    lengths = torch.tensor([0, 17, 44], dtype=torch.int32)
    caches = [torch.zeros(3, 2, 60, dim, dtype=dtype) for _ in range(2)]
    window = [torch.randn(3, 16, 2, dim).to(dtype).transpose(1, 2) for _ in range(2)]
    angles = make_angles(3, 16, rotary, torch.float32 if wide else dtype)
    query = torch.randn(3, 16, 5, dim).to(dtype)
    on_gpu = [tensor.to(DEVICE, copy=True) for tensor in (*caches, *window, lengths, *angles, query)]
    append_kv_(*caches, *window, lengths, *angles, query, backend="torch")
    append_kv_(*on_gpu, backend=gpu_backend)
    assert torch.equal(on_gpu[0].cpu(), caches[0]) and torch.equal(on_gpu[1].cpu(), caches[1])
    assert torch.equal(on_gpu[-1].cpu(), query)


@pytest.mark.parametrize("shape", [(1, 16, 4096), (2, 3, 896), (3, 32, 128), (1, 20, 5000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_activation(dtype, shape):
    x, delta, weight = 3 * torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    on_gpu = [tensor.to(DEVICE) for tensor in (x, delta, weight)]
    total, normed = add_rms_norm(*on_gpu, 1e-5, "triton")
    assert torch.equal(total.cpu(), x + delta)
    assert torch.equal(normed, rms_norm(total, on_gpu[2], 1e-5, "triton"))
    eps = torch.finfo(dtype).eps * (1.05 if dtype != torch.float32 else 4)
    wide = (x + delta).double()
    torch.testing.assert_close(normed.cpu().double(), reference_norm(wide, weight.double(), 1e-5), rtol=eps, atol=1e-7)
    activated = torch.nn.functional.silu(x.double()) * delta.double()
    torch.testing.assert_close(silu_mul(*on_gpu[:2], "triton").cpu().double(), activated, rtol=eps, atol=1e-7)


@pytest.mark.parametrize("tokens", [1, 8, 16, 17, 33, 64, 128, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lm_head_argmax(dtype, tokens):
    """Sums of small integers are exact, so that index and value are those of the unfused path, ties and all."""
    hidden, weight = integers(1, tokens, 520, dtype=dtype), integers(5001, 520, dtype=dtype)
    index, value = lm_head_argmax(hidden.to(DEVICE), weight.to(DEVICE))
    want = wanted(hidden, weight)
    assert torch.equal(index.cpu(), want[0]) and torch.equal(value.cpu(), want[1])


@pytest.mark.parametrize("options", ROUNDED, ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_lm_head_argmax_rounds_as_the_unfused_path(dtype, options):
    """Against exact sums and PyTorch's operations on this GPU, whose division and tanh may round unlike the CPU's."""
    hidden, weight = 8 * integers(2, 9, 200, dtype=dtype), 4 * integers(4000, 200, dtype=dtype)
    bias = torch.randint(-64, 64, (4000,)).to(dtype)
    on_gpu = [tensor.to(DEVICE) for tensor in (hidden, weight, bias)]
    index, value = lm_head_argmax(*on_gpu, **options, backend="triton")
    want = wanted(*on_gpu, **options)
    assert torch.equal(index.cpu(), want[0]) and torch.equal(value.cpu(), want[1])


def test_lm_head_argmax_of_float32_is_not_tf32():
    hidden, weight = torch.randn(1, 16, 1024), torch.randn(3000, 1024)
    _, value = lm_head_argmax(hidden.to(DEVICE), weight.to(DEVICE), backend="triton")
    exact = (hidden.double() @ weight.double().T).amax(-1)
    torch.testing.assert_close(value.cpu().double(), exact, rtol=1e-5, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_calls_allocate_no_device_memory_once_they_ran(backend, available):
    """From the second call on, torch's allocator has the blocks; a replay does not ask it at all."""
    available(backend)
    arguments = [x.to(DEVICE) for x in make(8, 2, 16, [20000, 700], dtype=torch.bfloat16)]
    head = torch.randn(2, 16, 64, device=DEVICE), torch.randn(5000, 64, device=DEVICE)

    def step():
        return block_attention(*arguments, backend=backend), lm_head_argmax(*head, backend="triton")

    def statistics():
        torch.cuda.synchronize()
        found = torch.cuda.memory_stats()
        return found["segment.all.allocated"], found["allocation.all.allocated"]

    for _ in range(2):
        step()
    segments, _ = statistics()
    for _ in range(5):
        step()
    assert statistics()[0] == segments
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    before = statistics()
    for _ in range(5):
        graph.replay()
    assert statistics() == before


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("mode", ["window", "block"])
@pytest.mark.parametrize("refill", ["context", "last"])
def test_converge_equals_the_oracle(seed, mode, refill, gpu_backend):
    generator = torch.Generator().manual_seed(seed)
    rows, width, vocabulary = 1 + seed % 5, (1, 2, 16, 17, 128)[seed % 5], (5, 33, 20000)[seed % 3]
    state = random_state(generator, rows, width, vocabulary, eos=[3, 4][: seed % 3], limit=40)
    for _ in range(5):
        logits = agreeable_logits(generator, state, vocabulary, DTYPES[seed % 3])
        want = oracle(logits, state, mode, refill)
        on_gpu = to_gpu(state)
        converge_(logits.to(DEVICE), on_gpu, mode, refill, backend=gpu_backend)
        state = JacobiState(*(tensor.cpu() for tensor in on_gpu.tensors()))
        assert_state(state, want)


@pytest.mark.parametrize("vocabulary", [33, 2500, 152064])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype, vocabulary, gpu_backend):
    """The token that the reference draws, or one within rounding of it."""
    seeds = torch.arange(4) * 2**32 + 5
    state = JacobiState.create(torch.ones(4, 1, dtype=torch.int64), limits=9, block_size=1, seeds=seeds)
    logits = (torch.randn(4, 1, vocabulary) * 3).to(dtype)
    on_gpu = to_gpu(state)
    for t in range(9):
        converge_(logits.to(DEVICE), on_gpu, refill="last", temperature=0.7, backend=gpu_backend)
        perturbed = logits.double() / 0.7 + gumbel(noise_words(seeds, torch.full((4, 1), t), vocabulary))
        token = on_gpu.output[:, t].cpu()[:, None, None]
        assert (perturbed.amax(-1) - perturbed.gather(-1, token)[..., 0]).max() < 2e-5


@needs_gpu  # on the CPU, converge_ raises
def test_nan_stops_all_rows(gpu_backend):
    state = random_state(torch.Generator().manual_seed(2), 4, 3, 5)
    state.limits.fill_(20)
    before = to_gpu(state)
    on_gpu = to_gpu(state)
    logits = torch.zeros(4, 3, 40000, device=DEVICE)
    logits[2, 2, 12345] = math.nan
    converge_(logits, on_gpu, backend=gpu_backend)
    assert on_gpu.status.tolist() == [4, 1]
    for (name, *_), tensor, old in zip(FIELDS, on_gpu.tensors(), before.tensors(), strict=True):
        assert name == "status" or torch.equal(tensor, old), name


def launch_all(backend, logits, tensors, caches, window, state):
    append_kv_(*caches, *window, state.lengths, backend=backend)
    out = block_attention(*tensors[:3], state.lengths, tensors[4], backend=backend)[0]
    converge_(logits, state, backend=backend)
    return out


def case(device):
    generator = torch.Generator().manual_seed(0)
    state = random_state(generator, 3, 4, 50, limit=200)
    state.limits.fill_(200)
    logits = agreeable_logits(generator, state, 50, torch.bfloat16).to(device)
    tensors = [x.to(device) for x in make(8, 2, 4, [400, 300, 200], spare=300, dtype=torch.bfloat16)]
    for cache in tensors[1:3]:
        cache.nan_to_num_()
    window = [torch.ones(3, 2, 4, 32, dtype=torch.bfloat16, device=device) for _ in range(2)]
    return logits, tensors, tensors[1:3], window, to_gpu(state, device)


@pytest.fixture(params=["cuda", "triton"])
def native(request, available):
    return available(request.param)


@needs_gpu
def test_streams_do_not_disturb_each_other(native):
    """Launches on two streams at once, many times: each stream has counters of its own."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    cases = [case("cuda") for _ in streams]
    torch.cuda.synchronize()
    outs = []
    for _ in range(50):
        for stream, arguments in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                outs.append(launch_all(native, *arguments))
    torch.cuda.synchronize()
    for first, second in zip(outs[::2], outs[1::2], strict=True):
        assert torch.equal(first, second)
    for a, b in zip(cases[0][-1].tensors(), cases[1][-1].tensors(), strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_graphs_run_beside_each_other(native):
    """Two graphs that were captured on one stream have counters of their own, and set them to 0 themselves."""
    cases = [case("cuda") for _ in range(2)]
    eager = case("cuda")
    warm = case("cuda")
    launch_all(native, *warm)
    torch.cuda.synchronize()
    graphs, outs = [], []
    for arguments in cases:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append(launch_all(native, *arguments))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        want = launch_all(native, *eager)
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for out, (*_, state) in zip(outs, cases, strict=True):
        assert torch.equal(out, want)
        for a, b in zip(state.tensors(), eager[-1].tensors(), strict=True):
            assert torch.equal(a, b)


@needs_gpu
def test_another_device_than_the_current_one(native):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    results = []
    for device in ("cuda:0", "cuda:1"):
        arguments = case(device)
        results.append((launch_all(native, *arguments), *arguments[-1].tensors()))
        assert torch.cuda.current_device() == 0
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@needs_gpu
def test_a_graph_replays_the_ops(native):
    """Captured once, replayed for every step: the state moves as it does in eager calls, until all rows are done."""
    captured, eager, warm = case(DEVICE), case(DEVICE), case(DEVICE)
    launch_all(native, *warm)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch_all(native, *captured)
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        state = JacobiState(*(x.cpu() for x in eager[-1].tensors()))
        logits = agreeable_logits(generator, state, 50, torch.bfloat16)
        for arguments in (captured, eager):
            arguments[0].copy_(logits)
        want = launch_all(native, *eager)
        graph.replay()
        assert torch.equal(out, want)
        for (name, *_), a, b in zip(FIELDS, captured[-1].tensors(), eager[-1].tensors(), strict=True):
            assert torch.equal(a, b), name
