"""What a decode step costs at real shapes, over the window's width and the cache's length, with random weights.

    python benchmarks/steps.py --shape qwen2.5-0.5b --width 1 --width 16 --length 128 --length 4096
    python benchmarks/steps.py --shape llama-2-7b --dtype bfloat16 --device cuda --json results.json

A step is a forward over the window behind a cache of the given length, and what turns its logits into tokens. The
methods take turns in one process: transformers' eager step with its dynamic cache, its step with a static cache and
torch.compile (at the first length alone), ours with one token and with windows. On a GPU ours are graphs of several
steps whose status is read a graph late (ours_graph; with the compiled forward, at the first length and for the widths
--compiled-width, ours_compiled_graph), launched one by one for the widths --eager-width; and the gap is the share of a
step in which the device idles: kernels' times are those of torch's profiler, the step's time was taken without it.
On the CPU, --fusions adds what each of our kernels gives: ours with torch's linear layers, with window_linear alone (the
decoder layers not fused), and with lm_head_argmax in place of logits (without converge_, which takes these).
The floor is the time in which the weights and the cache are read once at the bandwidth that a copy or a
sum reaches, or the arithmetic at the rate of a large matrix product, whichever is longer, both measured here.

    python benchmarks/steps.py --plot benchmarks/results/steps_cpu_fp32.json

draws such a file: a step over n and over L beside the floor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from measure import bandwidth, rate
from plot import draw_steps
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen2Config, StaticCache

from cllm_kernels import JacobiConfig, backends, optimize
from cllm_kernels.cli.commands import DTYPES, available_device, one_of, output_file
from cllm_kernels.comparison import device_name
from cllm_kernels.decoding import CACHE_NAME, JacobiCache, Processing, Session
from cllm_kernels.decoding.session import Poll, capture, make_step, on_graph_stream
from cllm_kernels.integrations.attention import as_mask, block_attention_enabled
from cllm_kernels.integrations.generate import window_forward
from cllm_kernels.ops import JacobiState, lm_head_argmax
from cllm_kernels.ops.block_attention import cuda_refusal

_LONG = 1 << 18
SHAPES = {
    "spider": lambda: AutoConfig.from_pretrained("models/spider-cllm"),
    "qwen2.5-0.5b": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=_LONG,
    ),
    "qwen2.5-1.5b": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=_LONG,
    ),
    "qwen2.5-7b": lambda: Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=_LONG,
    ),
    "llama-2-7b": lambda: LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=_LONG,
    ),
    "llama-3-8b": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=_LONG,
    ),
}  # fmt: skip


def random_model(shape: str, dtype: torch.dtype, device: torch.device):
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=dtype).eval()


def fill(cache, model, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
    """Random keys and values at the first `length` rows of every layer."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        states = torch.randn(2, batch, config.num_key_value_heads, length, dim, dtype=dtype, device=device)
        cache.update(states[0], states[1], layer)


def hf_step(cache, forward, batch: int, length: int, device: torch.device):
    """What generate does for a token, but for its bookkeeping: forward, float32 logits, argmax, a look at the token."""
    token = torch.ones(batch, 1, dtype=torch.int64, device=device)
    at = length

    def step():
        nonlocal at
        positions = torch.full((batch, 1), at, device=device)
        logits = forward(input_ids=token, position_ids=positions, use_cache=True, **{CACHE_NAME: cache}).logits
        token.copy_(logits[:, -1].float().argmax(-1, keepdim=True))
        at += 1
        token.tolist()

    return step


def our_session(
    model, call, shared: JacobiCache | None, batch: int, length: int, width: int, room: int, device: torch.device
) -> Session:
    """call: the model, or what torch.compile made of it; shared: a cache whose keys and values serve this session too."""
    bounds = torch.zeros(2, batch, dtype=torch.int32, device=device)
    prompt = torch.randint(0, model.config.vocab_size, (batch, 64), device=device)
    state = JacobiState.create(prompt, limits=room, block_size=width)
    state.lengths.set_(bounds[0])
    capacity = length + room + width if shared is None else shared.capacity
    forward, cache = window_forward(model, "block", bounds, capacity, "auto", None if call is model else call)
    if shared is None:
        fill(cache, model, batch, length, model.dtype, device)  # what it makes for `length` rows holds its whole capacity
    else:
        cache._buffers = shared._buffers
    bounds[0] = length
    return Session(forward, state, bounds, cache=cache)


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


@dataclasses.dataclass
class Way:
    """A way to make steps.

    Attributes:
        run: makes `steps` of them. Returns seconds a step where it knows better than the caller's clock.
        setup, restore: a context for it, and what has to be done before it; both untimed.
    """

    run: Callable[[], float | None]
    setup: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    restore: Callable[[], object] = lambda: None
    steps: int = 1


# Steps of a graph, and graphs that are launched, the first of them untimed: then the host is ahead of the device.
CHUNK, CHUNKS = 4, 3


def moment(on_gpu: bool):
    """Now, or when the device gets here."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def graphs(step, session: Session):
    """Steps as `run_chunks` makes them on a GPU: the status of a graph is read when the next one is on its way."""
    replay = capture(step, CHUNK, session.state.status[0])
    polls = [Poll(session.state, False) for _ in range(CHUNKS)]
    on_gpu = session.state.device.type == "cuda"

    def run() -> float:
        times = []
        for poll in polls:
            replay()
            poll.send()
            times.append(moment(on_gpu))
        for poll in polls:
            poll.wait()
        if on_gpu:
            times[-1].synchronize()
        seconds = 1e-3 * times[0].elapsed_time(times[-1]) if on_gpu else times[-1] - times[0]
        return seconds / (CHUNK * (CHUNKS - 1))

    return run


def busy_seconds(events) -> float:
    """Seconds in which at least one of the device's events of a profile runs."""
    busy = end = 0.0
    for first, last in sorted((event.time_range.start, event.time_range.end) for event in events):
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return 1e-6 * busy


def device_seconds(step) -> float:
    """For how long the device works in a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    return busy_seconds(event for event in profile.events() if event.device_type == cuda)


def weight_count(model) -> int:
    """Weights that a step reads."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.config.vocab_size * model.config.hidden_size  # of the embedding, a row a token is read
    return weights


def floor_seconds(model, batch: int, length: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    config = model.config
    weights = weight_count(model)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = 2 * batch * config.num_hidden_layers * config.num_key_value_heads * length * dim
    flops = 2 * batch * width * weights + 4 * batch * width * config.num_hidden_layers * config.num_attention_heads * length * dim
    threads = torch.get_num_threads()
    return max((weights + keys) * dtype.itemsize / bandwidth(threads), flops / rate(dtype, threads))


@contextlib.contextmanager
def linears_alone(model, backend: str):
    """`optimize` but for decoder layers and what calls them."""
    with optimize(model, backend) as done:
        for name in (*done.layers, *done.decoders):
            del model.get_submodule(name).__dict__["forward"]
        yield


# What turns off some of our kernels, by name.
FUSIONS = {
    "ours, torch's linears": lambda model, backend: contextlib.nullcontext(),
    "ours, window_linear": linears_alone,
}


def prediction_way(model, session: Session, width: int, setup) -> Way:
    """A forward that ends in predictions instead of logits."""
    weight = model.get_output_embeddings().weight

    def predict() -> None:
        outputs = model.get_decoder()(
            input_ids=session.state.window, attention_mask=as_mask(session.bounds), **{CACHE_NAME: session.cache},
            position_ids=session.window_positions(width), use_cache=True,
        )  # fmt: skip
        lm_head_argmax(outputs.last_hidden_state, weight)[0].tolist()

    return Way(predict, setup)


def our_way(name: str, session: Session, width: int, backend: str, setup) -> Way:
    """Our step of a session, by itself for a name that begins with "ours" and has no graph, else as graphs."""
    config = JacobiConfig(draft="none" if width == 1 else "context", block_size=max(2, width))
    step = make_step(session, config, Processing([], torch.zeros(1, 1), False), backend)
    restore = functools.partial(session.state.copy_, session.state.clone())
    if "graph" not in name:

        def eager() -> None:
            step()
            session.state.status.tolist()

        return Way(eager, setup, restore)
    with setup():
        with on_graph_stream(session.state.device):
            for _ in range(2):
                step()
        return Way(graphs(step, session), setup, restore, CHUNK * CHUNKS)


def measure(
    shape: str, dtype: torch.dtype, device: torch.device, batch: int, widths, long_widths, lengths, repeats: int,
    compiled: bool, eager_widths, compiled_widths, fusions: bool, done
):  # fmt: skip
    """Measures one shape; `done` gets the rows of a cache length when they are there."""
    model = random_model(shape, dtype, device)
    on_gpu = has_graphs(device)
    backend = backends.resolve("auto", device, cuda_refusal(dtype))
    own = "auto" if on_gpu else backend  # block_attention knows what was measured for its sizes
    room = max(16 * (repeats + 32), 2 * CHUNK * CHUNKS * max(widths))

    def sync():
        if on_gpu:
            torch.cuda.synchronize()

    for length in lengths:
        ways = {}  # by name and width

        @contextlib.contextmanager
        def ours_enabled(kernels=optimize):
            with block_attention_enabled(model, own), kernels(model, own):
                yield

        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            fill(cache, model, batch, length, dtype, device)
            ways["hf_eager", 1] = Way(hf_step(cache, model, batch, length, device))
            if compiled and length == lengths[0]:  # compiling takes minutes
                static = StaticCache(config=model.config, max_cache_len=length + room)
                fill(static, model, batch, length, dtype, device)
                call = torch.compile(model.forward, mode="reduce-overhead" if on_gpu else "default", dynamic=False)
                ways["hf_compiled", 1] = Way(hf_step(static, call, batch, length, device))
                for _ in range(3):  # compiled, and recorded by torch's graph trees, before graphs of ours are captured
                    ways["hf_compiled", 1].run()
            shared = None
            here = long_widths if long_widths and length != lengths[0] else widths
            for width in sorted(here, reverse=True):  # the widest has room for all
                if not on_gpu or width in eager_widths:
                    session = our_session(model, model, shared, batch, length, width, room, device)
                    shared = shared or session.cache
                    ways["ours", width] = our_way("ours", session, width, backend, ours_enabled)
                    for name, kernels in FUSIONS.items() if fusions else ():
                        setup = functools.partial(ours_enabled, kernels)
                        ways[name, width] = our_way(name, session, width, backend, setup)
                    if fusions:
                        ways["ours, lm_head_argmax", width] = prediction_way(model, session, width, ours_enabled)
                if on_gpu:
                    session = our_session(model, model, shared, batch, length, width, room, device)
                    shared = shared or session.cache
                    ways["ours_graph", width] = our_way("ours_graph", session, width, backend, ours_enabled)
            for width in compiled_widths if on_gpu and length == lengths[0] else ():
                call = torch.compile(model, dynamic=False)
                session = our_session(model, call, shared, batch, length, width, room, device)
                name, setup = "ours_compiled_graph", functools.partial(ours_enabled, FUSIONS["ours, torch's linears"])
                ways[name, width] = our_way(name, session, width, backend, setup)  # generate leaves out `optimize` there too
            times = {name: [] for name in ways}
            warm = 3 if compiled or compiled_widths else 1  # the first ones compile
            for turn in range(warm + repeats):
                for name, way in ways.items():
                    with way.setup():
                        way.restore()
                        way.run()  # so that each finds its own code and data in the caches
                        way.restore()
                        sync()
                        begin = time.perf_counter()
                        seconds = way.run()
                        sync()
                        wall = time.perf_counter() - begin
                        if turn >= warm:
                            times[name].append(wall / way.steps if seconds is None else seconds)
            gaps = {}
            for name, way in ways.items() if on_gpu else ():
                with way.setup():
                    way.restore()
                    sync()
                    gaps[name] = 1 - device_seconds(way.run) / way.steps / statistics.median(times[name])
        base = statistics.median(times["hf_eager", 1])
        weights = weight_count(model) * dtype.itemsize / bandwidth(torch.get_num_threads())
        part = []
        for (method, width), values in sorted(times.items()):
            median = statistics.median(values)
            same = [method] if method.startswith("ours") else []
            one = next((times[name, 1] for name in (*same, "ours_graph", "ours") if (name, 1) in times), None)
            floor = floor_seconds(model, batch, length, width, dtype, device)
            quartiles = statistics.quantiles(values, n=4, method="inclusive")
            part.append(
                {
                    "shape": shape, "method": method, "batch": batch, "block_size": width, "cache_length": length,
                    "ms": 1e3 * median, "ms_quartiles": [1e3 * quartiles[0], 1e3 * quartiles[2]],
                    "over_hf_eager": base / median, "floor_ms": 1e3 * floor, "of_floor": floor / median,
                    "weights_ms": 1e3 * weights, "over_weights": median / weights,
                    "over_ours_1": median / statistics.median(one) if one else None, "host_gap": gaps.get((method, width)),
                    "repeats": repeats, "dtype": str(dtype).removeprefix("torch."), "device": device_name(device),
                    "threads": torch.get_num_threads(), "backend": backend if method.startswith("ours") else "transformers",
                    "torch": torch.__version__, "transformers": transformers.__version__,
                }
            )  # fmt: skip
        done(part)
        del ways, way, shared, session, cache
        gc.collect()


def main(
    shape: Annotated[list[str], typer.Option(help=", ".join(SHAPES))] = (),
    batch: Annotated[list[int], typer.Option(min=1, help="Rows, each with a window.")] = (1,),
    width: Annotated[list[int], typer.Option(min=1)] = (1, 2, 4, 8, 16, 32, 64, 128),
    long_width: Annotated[list[int], typer.Option(min=1, help="Of all lengths but the first; as --width if none.")] = (),
    length: Annotated[list[int], typer.Option(min=1)] = (128, 1024),
    dtype: Annotated[str, typer.Option(callback=one_of(*DTYPES))] = "float32",
    device: Annotated[str, typer.Option(callback=available_device)] = "cpu",
    repeats: Annotated[int, typer.Option(min=2)] = 15,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    compiled: bool = True,
    eager_width: Annotated[list[int], typer.Option(min=1)] = (1, 16),
    compiled_width: Annotated[list[int], typer.Option(min=1)] = (),
    fusions: Annotated[bool, typer.Option(help="Ours without some of its kernels too; on the CPU.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", callback=output_file)] = None,
    keep: Annotated[bool, typer.Option(help="Other shapes' rows stay in the file of --json.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Measures nothing, draws this file of --json.", exists=True)] = None,
) -> None:
    if plot:
        output_file(plot.with_suffix(".png"))
        return print(draw_steps(plot))
    if not shape:
        raise typer.BadParameter("name a --shape, or a file to --plot")
    if unknown := set(shape) - set(SHAPES):
        raise typer.BadParameter(f"no shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    if fusions and device != "cpu":
        raise typer.BadParameter("--fusions compares kernels for the CPU")
    if threads:
        torch.set_num_threads(threads)
    rows, kept = [], []
    if keep and json_path and json_path.exists():
        kept = [row for row in json.loads(json_path.read_text()) if row["shape"] not in shape]

    def done(part):
        rows.extend(part)
        if json_path:  # whatever happens to the rest
            json_path.write_text(json.dumps(kept + rows, indent=1) + "\n")

    for name, rows_of_batch in itertools.product(shape, batch):
        measure(
            name, getattr(torch, dtype), torch.device(device), rows_of_batch, width, long_width, length, repeats, compiled,
            eager_width, compiled_width, fusions, done,
        )  # fmt: skip
    table = Table(title=f"ms a step, {dtype}, {rows[0]['device']}, {rows[0]['threads']} threads, medians of {repeats}")
    for heading in ("shape", "method", "batch", "n", "L", "ms", "quartiles", "over hf_eager", "over ours n = 1", "of the floor", "gap"):
        table.add_column(heading, justify="left" if heading in ("shape", "method") else "right")
    for row in rows:
        table.add_row(
            row["shape"], row["method"], str(row["batch"]), str(row["block_size"]), str(row["cache_length"]), f"{row['ms']:.2f}",
            "-".join(f"{value:.2f}" for value in row["ms_quartiles"]), f"{row['over_hf_eager']:.2f}x",
            "" if row["over_ours_1"] is None else f"{row['over_ours_1']:.2f}", f"{row['of_floor']:.0%}",
            "" if row["host_gap"] is None else f"{row['host_gap']:.0%}",
        )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
