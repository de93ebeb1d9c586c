"""The kernels as a GPU runs them, against the reference on the CPU. Triton's interpreter shows their logic, not this."""

import math

import pytest
import torch
from test_append_kv import make_angles
from test_block_attention import ATOL, DTYPES, expected, make, reference
from test_converge import agreeable_logits, assert_state, oracle, random_state
from test_lm_head_argmax import ROUNDED, integers, wanted

from cllm_kernels import backends
from cllm_kernels.ops import JacobiState, append_kv_, block_attention, converge_, lm_head_argmax
from cllm_kernels.ops.philox import gumbel, noise_words
from cllm_kernels.ops.state_fields import FIELDS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CUDA = torch.device("cuda")


@pytest.fixture(params=["cuda", "triton", "torch"])
def gpu_backend(request):
    reason = backends.available()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


def to_gpu(state, device=CUDA):
    return JacobiState(*(tensor.to(device) for tensor in state.tensors()))


def check(backend, options=None, **case):
    options = options or {}
    case = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in case.items())
    arguments, out, lse, error = expected(case, tuple(options.items()))
    on_gpu = [tensor.to(CUDA) for tensor in arguments]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got_out, got_lse = block_attention(*on_gpu, backend=backend, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (got_out.cpu().double() - out).abs().max().item() <= 2 * error + ATOL
    torch.testing.assert_close(got_lse.cpu().double(), lse, rtol=1e-5, atol=2 * ATOL)


def test_auto_follows_the_order():
    device = torch.device("cuda", 0)
    assert backends.resolve("auto", device) == next(name for name in backends.GPU_ORDER if backends.available()[name] is None)


@pytest.mark.parametrize("width", [1, 2, 16, 17, 64, 128])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("length", [0, 1, 63, 799, 20000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grid(dtype, length, group, width):
    check("triton", heads=2 * group, kv_heads=2, width=width, lengths=[length, length // 3],
          starts=[0, length // 5], dim=64, dtype=dtype)  # fmt: skip


@pytest.mark.parametrize("dims", [(8, 8), (32, 32), (64, 128), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("width", [2, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(dtype, width, dims):
    check("triton", heads=8, kv_heads=2, width=width, lengths=[700, 3], dim=dims[0], value_dim=dims[1], dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [{"scale": 0.3}, {"sliding_window": 7}, {"sliding_window": 1000}, {"softcap": 2.0}, {"softcap": 30.0, "sliding_window": 20}],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 333])
def test_options(width, dtype, options):
    check("triton", options, heads=6, kv_heads=2, width=width, lengths=[1300, 40], starts=[0, 3], dim=64, dtype=dtype)


@pytest.mark.parametrize("length", [5, 1200])
def test_sinks(length):
    arguments = make(6, 2, 4, [length, 2])
    sinks = torch.tensor([-1.0, 0.0, 3.0, -math.inf, 20.0, 0.5])
    out, lse = reference(*arguments, sinks=sinks, dtype=torch.float64)
    got, got_lse = block_attention(*(x.to(CUDA) for x in arguments), sinks=sinks.to(CUDA), backend="triton")
    torch.testing.assert_close(got.cpu().double(), out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_lse.cpu().double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_later_rows_of_the_window_are_not_read(dtype, poison):
    query, keys, values, lengths, starts = (x.to(CUDA) for x in make(8, 2, 16, [700, 7], dtype=dtype))
    clean, _ = block_attention(query, keys, values, lengths, starts, backend="triton")
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, length + 9] = poison
        values[row, :, length + 9] = poison
    out, _ = block_attention(query, keys, values, lengths, starts, backend="triton")
    assert torch.equal(out[:, :9], clean[:, :9])
    assert not out[:, 9:].isfinite().any(-1).any() or not math.isnan(poison)


def test_rows_do_not_depend_on_the_batch():
    arguments = [x.to(CUDA) for x in make(8, 2, 16, [20000, 700, 31])]
    want, _ = block_attention(*arguments, backend="triton")
    for row in range(3):
        one = [x[row : row + 1] for x in arguments]
        assert torch.equal(block_attention(*one, backend="triton")[0], want[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append(dtype, gpu_backend):
    lengths = torch.tensor([0, 17, 44], dtype=torch.int32, device=CUDA)
    caches = [torch.zeros(3, 2, 60, dim, dtype=dtype, device=CUDA) for dim in (24, 40)]
    window = [torch.randn(3, 16, 2, dim, device=CUDA).to(dtype).transpose(1, 2) for dim in (24, 40)]
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
    on_gpu = [tensor.to(CUDA) for tensor in (*caches, *window, lengths, *angles)]
    append_kv_(*caches, *window, lengths, *angles, backend="torch")
    append_kv_(*on_gpu, backend=gpu_backend)
    assert torch.equal(on_gpu[0].cpu(), caches[0]) and torch.equal(on_gpu[1].cpu(), caches[1])


@pytest.mark.parametrize("tokens", [1, 8, 16, 17, 33, 64, 128, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lm_head_argmax(dtype, tokens):
    """Sums of small integers are exact, so that index and value are those of the unfused path, ties and all."""
    hidden, weight = integers(1, tokens, 520, dtype=dtype), integers(5001, 520, dtype=dtype)
    index, value = lm_head_argmax(hidden.to(CUDA), weight.to(CUDA))
    want = wanted(hidden, weight)
    assert torch.equal(index.cpu(), want[0]) and torch.equal(value.cpu(), want[1])


@pytest.mark.parametrize("options", ROUNDED, ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_lm_head_argmax_rounds_as_the_unfused_path(dtype, options):
    """Against exact sums and PyTorch's operations on this GPU, whose division and tanh may round unlike the CPU's."""
    hidden, weight = 8 * integers(2, 9, 200, dtype=dtype), 4 * integers(4000, 200, dtype=dtype)
    bias = torch.randint(-64, 64, (4000,)).to(dtype)
    on_gpu = [tensor.to(CUDA) for tensor in (hidden, weight, bias)]
    index, value = lm_head_argmax(*on_gpu, **options, backend="triton")
    want = wanted(*on_gpu, **options)
    assert torch.equal(index.cpu(), want[0]) and torch.equal(value.cpu(), want[1])


def test_lm_head_argmax_of_float32_is_not_tf32():
    hidden, weight = torch.randn(1, 16, 1024), torch.randn(3000, 1024)
    _, value = lm_head_argmax(hidden.to(CUDA), weight.to(CUDA), backend="triton")
    exact = (hidden.double() @ weight.double().T).amax(-1)
    torch.testing.assert_close(value.cpu().double(), exact, rtol=1e-5, atol=1e-4)


def test_calls_allocate_no_device_memory_once_they_ran():
    """From the second call on, torch's allocator has the blocks; a replay does not ask it at all."""
    arguments = [x.to(CUDA) for x in make(8, 2, 16, [20000, 700])]
    head = torch.randn(2, 16, 64, device=CUDA), torch.randn(5000, 64, device=CUDA)

    def step():
        return block_attention(*arguments, backend="triton"), lm_head_argmax(*head, backend="triton")

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
        converge_(logits.to(CUDA), on_gpu, mode, refill, backend=gpu_backend)
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
        converge_(logits.to(CUDA), on_gpu, refill="last", temperature=0.7, backend=gpu_backend)
        perturbed = logits.double() / 0.7 + gumbel(noise_words(seeds, torch.full((4, 1), t), vocabulary))
        token = on_gpu.output[:, t].cpu()[:, None, None]
        assert (perturbed.amax(-1) - perturbed.gather(-1, token)[..., 0]).max() < 2e-5


def test_nan_stops_all_rows(gpu_backend):
    state = random_state(torch.Generator().manual_seed(2), 4, 3, 5)
    state.limits.fill_(20)
    before = to_gpu(state)
    on_gpu = to_gpu(state)
    logits = torch.zeros(4, 3, 40000, device=CUDA)
    logits[2, 2, 12345] = math.nan
    converge_(logits, on_gpu, backend=gpu_backend)
    assert on_gpu.status.tolist() == [4, 1]
    for (name, *_), tensor, old in zip(FIELDS, on_gpu.tensors(), before.tensors(), strict=True):
        assert name == "status" or torch.equal(tensor, old), name


def test_a_graph_replays_the_ops():
    """Captured once, replayed for every step: the state moves as it does in eager calls."""
    generator = torch.Generator().manual_seed(0)
    state = random_state(generator, 3, 16, 50, limit=200)
    state.limits.fill_(200)
    eager, captured = to_gpu(state), to_gpu(state)
    logits = torch.empty(3, 16, 50, device=CUDA)
    query, keys, values, _, starts = (x.to(CUDA) for x in make(8, 2, 16, [400, 300, 200], spare=300))
    keys.nan_to_num_()
    values.nan_to_num_()

    def step(of):
        converge_(logits, of, backend="triton")
        return block_attention(query, keys, values, of.lengths, starts, backend="triton")[0]

    logits.copy_(agreeable_logits(generator, state, 50, torch.float32))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(captured.clone())  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(captured)
    for _ in range(12):
        logits.copy_(agreeable_logits(generator, JacobiState(*(x.cpu() for x in eager.tensors())), 50, torch.float32))
        want = step(eager)
        graph.replay()
        assert torch.equal(out, want)
        for (name, *_), a, b in zip(FIELDS, captured.tensors(), eager.tensors(), strict=True):
            assert torch.equal(a, b), name
