"""Times of the ops against what PyTorch offers for the same work, and the rates reached.

    pytest benchmarks/test_kernels.py --benchmark-json=kernels.json

Rounds are interleaved: each runs every alternative and then ours, so that another load on the machine hits all alike.
pytest-benchmark's statistics are ours; the alternatives' medians and all else stand in `extra_info`.
"""

import statistics
import time

import pytest
import torch
import torch.nn.functional as F

from cllm_kernels import backends
from cllm_kernels.ops import JacobiState, append_kv_, block_attention, converge_

WIDTH = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (Hq, Hkv, D): Llama-3-8B, Qwen2.5-0.5B, and about the bundled model.
SHAPES = {"32x8x128": (32, 8, 128), "14x2x64": (14, 2, 64), "8x4x32": (8, 4, 32)}

pytestmark = pytest.mark.skipif(backends.EXTENSION is None, reason=str(backends.available()["cpp"]))


@pytest.fixture(params=["one thread", "all threads"])
def threads(request):
    """On a machine that does other work, only one thread gives ratios to trust: a barrier waits for time slices."""
    before = torch.get_num_threads()
    if request.param == "one thread":
        torch.set_num_threads(1)
    elif before == 1:
        pytest.skip("torch has one thread")
    yield torch.get_num_threads()
    torch.set_num_threads(before)


def compare(benchmark, report, ours, alternatives, flops, nbytes, before=lambda: None):
    """Runs interleaved rounds for about half a second; `before` restores what a run changes.

    flops and nbytes are what the work needs at least: multiply-adds counted twice, and each byte of the caches or
    logits read once.
    """
    times = {name: [] for name in alternatives}
    ours_times = []

    def run(function, to):
        before()
        begin = time.perf_counter()
        function()
        to.append(time.perf_counter() - begin)

    def others():
        for name, function in alternatives.items():
            run(function, times[name])
        before()

    def timed():
        begin = time.perf_counter()
        ours()
        ours_times.append(time.perf_counter() - begin)

    others()
    timed()
    round_time = sum(values[0] for values in times.values()) + ours_times[0]
    for values in (*times.values(), ours_times):  # the first calls set things up
        values.clear()
    benchmark.pedantic(timed, setup=others, rounds=int(min(100, max(7, 0.5 / round_time))))
    medians = {name: statistics.median(values) for name, values in times.items()}
    median = statistics.median(ours_times)
    report(
        ours_s=median,
        alternatives_s=medians,
        speedup=min(medians.values()) / median,
        gflops=flops / median / 1e9,
        gbytes=nbytes / median / 1e9,
        backend=f"cpp ({backends.EXTENSION.cpu_isa()})",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


@pytest.mark.parametrize(("batch", "length"), [(1, 256), (1, 1024), (1, 8192), (4, 256), (4, 1024)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_attention(benchmark, report, threads, dtype, shape, batch, length):
    heads, kv_heads, dim = SHAPES[shape]
    rows = length + WIDTH
    query = torch.randn(batch, WIDTH, heads, dim).to(DTYPES[dtype])
    keys, values = (torch.randn(batch, kv_heads, rows, dim).to(DTYPES[dtype]) for _ in range(2))
    lengths = torch.full((batch,), length, dtype=torch.int32)
    starts = torch.zeros(batch, dtype=torch.int32)

    visible = torch.ones(WIDTH, rows, dtype=torch.bool).tril(length).expand(batch, 1, WIDTH, rows)
    added = torch.zeros(batch, 1, WIDTH, rows, dtype=query.dtype).masked_fill(~visible, -torch.inf)
    wide = [cache.repeat_interleave(heads // kv_heads, 1) for cache in (keys, values)]
    transposed = query.transpose(1, 2)
    sdpa = F.scaled_dot_product_attention
    with torch.inference_mode():
        compare(
            benchmark,
            report,
            lambda: block_attention(query, keys, values, lengths, starts, backend="cpp"),
            {
                "sdpa, bool mask, gqa": lambda: sdpa(transposed, keys, values, visible, enable_gqa=True),
                "sdpa, float mask, gqa": lambda: sdpa(transposed, keys, values, added, enable_gqa=True),
                "sdpa, float mask, expanded before": lambda: sdpa(transposed, *wide, added),
            },
            flops=4 * batch * heads * WIDTH * rows * dim,
            nbytes=keys.nbytes + values.nbytes,
        )


@pytest.mark.parametrize("vocabulary", [32_000, 152_064])
@pytest.mark.parametrize("dtype", DTYPES)
def test_converge(benchmark, report, threads, dtype, vocabulary):
    logits = torch.randn(1, WIDTH, vocabulary).to(DTYPES[dtype])
    state = JacobiState.create(torch.arange(100)[None], limits=1000, block_size=WIDTH, eos=[vocabulary])
    fresh = state.clone()

    def restore():
        for tensor, value in zip(state.tensors(), fresh.tensors()):
            tensor.copy_(value)

    with torch.inference_mode():
        compare(
            benchmark,
            report,
            lambda: converge_(logits, state, backend="cpp"),
            {
                "torch": lambda: converge_(logits, state, backend="torch"),
                "torch.argmax alone": lambda: logits.argmax(-1),
            },
            flops=0,
            nbytes=logits.nbytes,
            before=restore,
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_kv(benchmark, report, dtype, shape):
    _, kv_heads, dim = SHAPES[shape]
    caches = [torch.zeros(4, kv_heads, 2048, dim).to(DTYPES[dtype]) for _ in range(2)]
    window = [torch.randn(4, WIDTH, kv_heads, dim).to(DTYPES[dtype]).transpose(1, 2) for _ in range(2)]
    lengths = torch.tensor([5, 700, 31, 2000], dtype=torch.int32)
    with torch.inference_mode():
        compare(
            benchmark,
            report,
            lambda: append_kv_(*caches, *window, lengths, backend="cpp"),
            {"torch": lambda: append_kv_(*caches, *window, lengths, backend="torch")},
            flops=0,
            nbytes=2 * sum(tensor.nbytes for tensor in window),
        )
