"""Times of an op beside its alternatives, and the floor that the device sets.

On the CPU, rounds are interleaved: each runs every alternative and ours, so that another load on the machine hits all
alike. On a GPU, CUDA events time each call with a cold L2 cache, one function after the other; pytest-benchmark's
own statistics are then the whole call as the host sees it, with a synchronisation.
"""

import functools
import os
import statistics
import time

import torch

from cllm_kernels import backends
from cllm_kernels.ops import window_linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
BACKEND = backends.resolve("auto", DEVICE)
REPEATS = 20  # on a GPU
# Calls everything once, so that many processes can compile what one then measures.
COMPILE_ALONE = os.environ.get("CLLM_BENCH_COMPILE_ALONE") == "1"


def device_name() -> str:
    if ON_GPU:
        return torch.cuda.get_device_name()
    return f"CPU ({backends.EXTENSION.cpu_isa()})" if backends.EXTENSION else "CPU"


def _seconds(function) -> float:
    """The best of some runs, for the peaks below."""
    function()
    if ON_GPU:
        return min(_device_times(function, lambda: None))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


@functools.cache
def bandwidth(threads: int) -> float:
    """Bytes per second that a large copy reads and writes on this device, or that a large sum reads, where that is more."""
    size = 1 << (31 if ON_GPU else 30)  # of which little stays in a cache
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copied = 2 * size / _seconds(lambda: target.copy_(source))
    return max(copied, size / _seconds(lambda: source.view(torch.float32).sum()))


@functools.cache
def rate(dtype: torch.dtype, threads: int) -> float:
    """Floating-point operations per second of a large matrix product on this device. On the CPU the faster one of torch's
    and ours, where bfloat16 is also multiplied in float32."""
    size = 8192 if ON_GPU else 1024
    a, b = torch.randn(2, size, size, device=DEVICE).to(dtype)  # GPUs multiply equal numbers faster than they can
    fastest = 2 * size**3 / _seconds(lambda: a @ b)
    if not ON_GPU:
        rows = 128  # on some CPUs window_linear leaves more to torch
        fastest = max(fastest, 2 * rows * size**2 / _seconds(lambda: window_linear(a[:rows], b)))
        if dtype != torch.float32:
            fastest = max(fastest, rate(torch.float32, threads))
    return fastest


@functools.cache
def _flush() -> torch.Tensor:
    return torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)


def _device_times(function, before) -> list[float]:
    """Seconds between two events around each call, behind a write of 1 GiB.

    The write empties the L2 cache, and while it runs the host gets ahead, so that its own time does not count.
    """
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for _ in range(3):
        before()
        function()
    for begin, end in events:
        before()
        _flush().zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [1e-3 * begin.elapsed_time(end) for begin, end in events]


def _interleaved(benchmark, ours, alternatives, before) -> tuple[list[float], dict[str, list[float]]]:
    """About a second of rounds. Each timed call follows an untimed one, so that all find their code in the caches:
    alternatives that share code would otherwise warm it for each other."""
    times = {name: [] for name in alternatives}
    ours_times = []

    def run(function, to):
        begin = time.perf_counter()
        function()
        to.append(time.perf_counter() - begin)

    def warm(function):
        before()
        function()
        before()

    def others():
        for name, function in alternatives.items():
            warm(function)
            run(function, times[name])
        warm(ours)

    def timed():
        run(ours, ours_times)

    others()
    timed()
    round_time = sum(values[0] for values in times.values()) + ours_times[0]
    for values in (*times.values(), ours_times):  # the first calls set things up
        values.clear()
    benchmark.pedantic(timed, setup=others, rounds=int(min(200, max(7, 0.5 / round_time))))
    return ours_times, times


def compare(benchmark, report, ours, alternatives, flops, nbytes, dtype, before=lambda: None, backend=BACKEND):
    """Times `ours` and the alternatives; `before` restores what a run changes.

    flops and nbytes are what the work needs at least: multiply-adds counted twice, and each byte of the caches or
    logits read once. The floor is what they take at the bandwidth of a large copy and the rate of a large matrix
    product, both measured here.
    """
    if COMPILE_ALONE:
        for function in (ours, *alternatives.values()):
            before()
            function()
        return
    threads = torch.get_num_threads()
    if ON_GPU:
        ours_times = _device_times(ours, before)
        times = {name: _device_times(function, before) for name, function in alternatives.items()}

        def timed():
            ours()
            torch.cuda.synchronize()

        benchmark.pedantic(timed, setup=before, rounds=REPEATS)
    else:
        ours_times, times = _interleaved(benchmark, ours, alternatives, before)
    medians = {name: statistics.median(values) for name, values in times.items()}
    median = statistics.median(ours_times)
    quartiles = statistics.quantiles(ours_times, n=4)
    floor = max(nbytes / bandwidth(threads), flops / rate(dtype, threads))
    report(
        ours_s=median,
        ours_quartiles_s=[quartiles[0], quartiles[2]],
        repeats=len(ours_times),
        alternatives_s=medians,
        speedup=min(medians.values()) / median,
        floor_s=floor,
        of_floor=floor / median,
        gflops=flops / median / 1e9,
        gbytes=nbytes / median / 1e9,
        backend=backend,
        device=device_name(),
        threads=threads,
        torch=torch.__version__,
    )
