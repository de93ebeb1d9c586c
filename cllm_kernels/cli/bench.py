"""``cllm bench``: Jacobi decoding end to end against the ways to decode that transformers has, in one run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CompileConfig, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from ..comparison import check_models, device_name, encode, load_model, take_turns
from ..decoding import CACHE_NAME, JacobiConfig, JacobiStatistics
from ..integrations.generate import JacobiGenerator
from ..integrations.verification import verify
from ..spider import exact_match, is_degenerate, prompt_for, read_jsonl, read_questions

Run = Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, JacobiStatistics | None]]


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to decode.

    Attributes:
        name: as the table has it.
        make: gives the function that decodes; called once for each model.
        jacobi: its configuration, or None for one of transformers' ways.
    """

    name: str
    make: Callable[[PreTrainedModel, int], Run]
    jacobi: JacobiConfig | None = None


def _hf(**options) -> Callable[[PreTrainedModel, int], Run]:
    def make(model: PreTrainedModel, max_new_tokens: int) -> Run:
        return lambda inputs: (
            model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, **options), None
        )  # fmt: skip

    return make


def _hf_compiled(model: PreTrainedModel, max_new_tokens: int) -> Run:
    """A static cache that is kept, so that nothing is compiled again for another prompt."""
    compile_config = CompileConfig(fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
    compile_config._compile_all_devices = True
    limit = model.config.max_position_embeddings
    caches: dict[int, StaticCache] = {}

    def run(inputs):
        rows, width = inputs["input_ids"].shape
        size = min(limit, -(-(width + max_new_tokens) // 256) * 256)
        cache = caches.setdefault((rows, size), StaticCache(config=model.config, max_cache_len=size))
        cache.reset()
        return (
            model.generate(
                **inputs, do_sample=False, max_new_tokens=max_new_tokens, compile_config=compile_config,
                **{CACHE_NAME: cache},
            ),
            None,
        )  # fmt: skip

    return run


def _jacobi(config: JacobiConfig) -> Callable[[PreTrainedModel, int], Run]:
    def make(model: PreTrainedModel, max_new_tokens: int) -> Run:
        generator = JacobiGenerator(model, config)

        def run(inputs):
            sequences = generator.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            return sequences, generator.statistics

        return run

    return make


def methods(
    block_sizes: list[int],
    batch: int,
    draft_model: PreTrainedModel | None,
    compiled: bool,
    max_batch_size: int | None = None,
) -> list[Method]:
    """The baselines, then Jacobi decoding in each mode and with each draft source; the first one is what others are
    compared with. All of ours but one run `optimize` on the CPU. Prompt lookup and assisted generation of transformers
    take one row only. Of larger batches, drafts from the lookup are also decoded by ``max_batch_size`` rows at once."""
    found = [Method("hf_ar", _hf())]
    if compiled:
        found.append(Method("hf_ar_compiled", _hf_compiled))
    if batch == 1:
        found.append(Method("hf_prompt_lookup", _hf(prompt_lookup_num_tokens=10)))
        if draft_model is not None:
            found.append(Method("hf_assisted", _hf(assistant_model=draft_model)))
    found.append(_named("ar", JacobiConfig(draft="none")))
    for size in block_sizes:
        found.append(_named("jacobi_window", JacobiConfig(size)))
        found.append(_named("jacobi_window, torch's linears", JacobiConfig(size, optimize=False)))
        found.append(_named("jacobi_adaptive", JacobiConfig(size, adaptive=True)))
        found.append(_named("jacobi_block", JacobiConfig(size, "block")))
        found.append(_named("jacobi_lookup", JacobiConfig(size, draft="lookup")))
        if max_batch_size is not None and max_batch_size < batch:
            config = JacobiConfig(size, draft="lookup", max_batch_size=max_batch_size)
            found.append(_named(f"jacobi_lookup, {max_batch_size} rows at once", config))
        found.append(_named("jacobi_candidates", JacobiConfig(size, candidates=2)))
        found.append(_named("jacobi_auto", JacobiConfig(size, draft="auto")))
        found.append(_named("jacobi_auto_candidates", JacobiConfig(size, draft="auto", candidates=2)))
    return found


def _named(name: str, config: JacobiConfig) -> Method:
    return Method(name, _jacobi(config), config)


def read_workload(name: str, data: Path, count: int) -> list[dict]:
    """Prompts as ``{"prompt", "query"}``; query is the gold answer where the bundled models are asked for one."""
    if name == "spider":
        rows = read_questions("models/spider-cllm/held_out_sample.jsonl")[:count]
        return [{"prompt": prompt_for(row), "query": row["query"]} for row in rows]
    path, key = {
        "gsm8k": (data / "gsm8k/test.jsonl", "question"),
        "humaneval": (data / "humaneval/HumanEval.jsonl", "prompt"),
    }[name]
    if not path.is_file():
        raise FileNotFoundError(f"no prompts at {path}; --data names the folder that holds {name}")
    rows = list(read_jsonl(path, (key,)).values())[:count]
    return [{"prompt": row[key] + "\n", "query": None} for row in rows]


def run(
    models: dict[str, str],
    workload: str,
    data: Path,
    prompts: int,
    batches: list[int],
    block_sizes: list[int],
    max_new_tokens: int,
    rounds: int,
    draft: str | None,
    compiled: bool,
    max_batch_size: int | None,
    device: str,
    dtype: str,
    console: Console,
) -> list[dict]:
    """One row for each model, batch size and method.

    In each round, the batch sizes of a model come one after the other, and on each input the methods.
    """
    entries = read_workload(workload, data, prompts)
    check_models(models.values())
    draft_model = load_model(draft, dtype, device)[0] if draft else None
    rows = []
    for name, path in models.items():
        model, tokenizer = load_model(path, dtype, device)
        measurements = [
            _Measurement(
                model, tokenizer, entries, methods(block_sizes, batch, draft_model, compiled, max_batch_size), batch,
                max_new_tokens,
            )
            for batch in batches
        ]  # fmt: skip
        for number in range(1, rounds + 1):
            for measurement in measurements:
                title = f"{name}, batch {measurement.batch}, round {number} of {rounds}"
                measurement.run(functools.partial(track, description=title, console=console))
        for measurement in measurements:
            rows += [{"model": name, "workload": workload} | row for row in measurement.rows()]
    return rows


class _Measurement:
    """The methods on one model, with batches of one size, round by round."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        entries: list[dict],
        found: list[Method],
        batch: int,
        max_new_tokens: int,
    ):
        self.model, self.tokenizer, self.found = model, tokenizer, found
        self.batch, self.max_new_tokens = batch, max_new_tokens
        batches = _grouped(entries, batch)
        self.batches = [chunk for chunk in batches if len(chunk) == batch] or batches
        texts = [[entry["prompt"] for entry in chunk] for chunk in self.batches]
        configs = [method.jacobi for method in found if method.jacobi is not None]
        self.encoded = encode(model, tokenizer, texts, max_new_tokens, configs)
        self.runs = [method.make(model, max_new_tokens) for method in found]
        self.peaks = []
        for decode in self.runs:  # the first runs compile and are not counted
            with _peak_memory(model.device) as peak:
                decode(self.encoded[0])
            self.peaks.append(peak[0])
            for inputs in self.encoded[1:]:  # what depends on their lengths is made too: static caches, graphs
                decode(inputs)
        # Ours say what the prompt's forward took; of the others it is what one token takes.
        self.first = [index for index, method in enumerate(found) if method.jacobi is None]
        self.runs += [found[index].make(model, 1) for index in self.first]
        self.turns: list[list[list]] = [[[] for _ in self.encoded] for _ in self.runs]  # [method][input][round]

    def run(self, progress: Callable[[Iterable], Iterable]) -> None:
        """One round."""
        turns = take_turns(self.runs, self.encoded, 1, self.model.device, progress)
        for own, new in zip(self.turns, turns, strict=True):
            for prompt, times in zip(own, new, strict=True):
                prompt += times

    def rows(self) -> list[dict]:
        model, tokenizer, found, encoded = self.model, self.tokenizer, self.found, self.encoded
        seconds = [[statistics.median(taken for taken, _ in prompt) for prompt in own] for own in self.turns]
        starts = dict(zip(self.first, seconds[len(found) :], strict=True))
        prefills, outputs, statistics_of, certificates = [], [], [], []
        for index, own in enumerate(self.turns[: len(found)]):
            counts = [[run for _, (_, run) in prompt] for prompt in own]
            prefills.append(
                starts.get(index) or [statistics.median(run.prefill_seconds for run in prompt) for prompt in counts]
            )
            statistics_of.append([prompt[0] for prompt in counts if prompt[0] is not None])
            widths = [inputs["input_ids"].shape[1] for inputs in encoded]
            outputs.append(
                [prompt[0][1][0][:, width:].tolist() for prompt, width in zip(own, widths, strict=True)]
            )
            certificates.append(
                [
                    verify(model, **inputs, output=prompt[0][1][0], max_new_tokens=self.max_new_tokens, do_sample=False)
                    for inputs, prompt in zip(encoded, own, strict=True)
                ]
            )
        stop = {model.generation_config.eos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id} - {None}
        flat = [[_cut(row, stop) for rows in method for row in rows] for method in outputs]
        queries = [entry["query"] for chunk in self.batches for entry in chunk]
        base = sum(map(len, flat[0])) / sum(seconds[0])
        rows = []
        for index, method in enumerate(found):
            tokens = sum(map(len, flat[index]))
            ratios = [ar / own for ar, own in zip(seconds[0], seconds[index], strict=True)]
            counts = statistics_of[index]
            texts = tokenizer.batch_decode(flat[index], skip_special_tokens=True)
            graded = [exact_match(text, query) for text, query in zip(texts, queries, strict=True) if query is not None]
            sequences = len(flat[index])
            decoding = sum(seconds[index]) - sum(prefills[index])
            if counts:
                prefill_tokens = sum(c.prefill_tokens for c in counts)
                forwards = sum(c.forwards - c.prefill_forwards for c in counts)
            else:  # a token in the first forward, and, where nothing drafts, one in each of the others
                prefill_tokens = sequences
                drafts = method.name not in ("hf_ar", "hf_ar_compiled")
                forwards = None if drafts else sum(max(map(len, part)) - 1 for part in _grouped(flat[index], self.batch))
            rows.append(
                {
                    "method": method.name,
                    "block_size": method.jacobi.width if method.jacobi else 1,
                    "mode": method.jacobi.mode if method.jacobi else None,
                    "draft": method.jacobi.draft if method.jacobi else None,
                    "batch": self.batch,
                    "prompts": len(queries),
                    "tokens_per_second": tokens / sum(seconds[index]),
                    "decode_tokens_per_second": (tokens - prefill_tokens) / decoding,
                    "ms_per_forward": 1e3 * decoding / forwards if forwards else None,
                    "tokens_per_forward": (
                        sum(c.tokens for c in counts) / sum(c.iterations for c in counts) if counts else None
                    ),
                    "speedup": tokens / sum(seconds[index]) / base,
                    "speedup_quartiles": statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3,
                    "equal_to_hf_ar": _mean(own == ar for own, ar in zip(flat[index], flat[0], strict=True)),
                    # tokens that are not the argmax of their prefix, and those of them that rounding decided
                    "mismatches": sum(len(certificate.mismatches) for certificate in certificates[index]),
                    "near_ties": sum(certificate.near_ties for certificate in certificates[index]),
                    "exact_match": _mean(graded) if graded else None,
                    "degenerate": _mean(map(is_degenerate, flat[index])),
                    "fast_forwarded": sum(c.fast_forwarded for c in counts) / sequences if counts else None,
                    "stationary": sum(c.stationary for c in counts) / sequences if counts else None,
                    "paper_fast_forwarded": sum(c.paper_fast_forwarded for c in counts) / sequences if counts else None,
                    "paper_stationary": sum(c.paper_stationary for c in counts) / sequences if counts else None,
                    "accept_histogram": [sum(column) for column in zip(*(c.accept_histogram for c in counts), strict=True)],
                    "steps": _steps(counts),
                    "peak_memory_bytes": self.peaks[index],
                    "rounds": len(self.turns[0][0]),
                    "max_new_tokens": self.max_new_tokens,
                    "backend": counts[0].backend if counts else "transformers",
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "device": device_name(model.device),
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                }
            )
        return rows


def _cut(row: list[int], stop: set[int]) -> list[int]:
    """Up to the first token that ends or pads, that one included."""
    end = next((index + 1 for index, token in enumerate(row) if token in stop), len(row))
    return row[:end]


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def _grouped(rows: list, size: int) -> list[list]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _steps(counts: list[JacobiStatistics]) -> dict[str, int]:
    total: dict[str, int] = {}
    for run in counts:
        for (source, width), times in run.steps.items():
            total[f"{source} {width}"] = total.get(f"{source} {width}", 0) + times
    return total


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int | None]]:
    """Bytes that the process, or torch on a GPU, held at most inside; None where the system does not tell."""
    peak: list[int | None] = [None]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: begin the peak of the resident set anew
    except OSError:
        yield peak
        return
    yield peak
    status = Path("/proc/self/status").read_text()
    peak[0] = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def table(rows: list[dict]) -> Table:
    """The rows as one reads them; the JSON has more."""
    first = rows[0]
    view = Table(
        title=f"{first['workload']}, {first['dtype']}, {first['device']}, {first['threads']} threads, medians of "
        f"{first['rounds']} interleaved rounds",
        box=box.SIMPLE, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    for heading in ("model", "method"):
        view.add_column(heading, no_wrap=True)
    for heading in (
        "batch", "n", "tokens/s", "without\nprefill", "ms/\nforward", "tokens/\nforward", "speed-\nup", "quartiles", "equal\nto AR",
        "near-\nties", "exact\nmatch", "MiB",
    ):  # fmt: skip
        view.add_column(heading, justify="right", no_wrap=True)

    def show(value: float | None, form: str) -> str:
        return "" if value is None or value != value else format(value, form)

    for row in rows:
        quartiles = row["speedup_quartiles"]
        view.add_row(
            row["model"], row["method"], str(row["batch"]), str(row["block_size"]),
            f"{row['tokens_per_second']:.0f}", f"{row['decode_tokens_per_second']:.0f}", show(row["ms_per_forward"], ".2f"),
            show(row["tokens_per_forward"], ".2f"),
            f"{row['speedup']:.2f}x", f"{quartiles[0]:.2f}-{quartiles[2]:.2f}", f"{row['equal_to_hf_ar']:.1%}",
            f"{row['near_ties']} of {row['mismatches']}" if row["mismatches"] else "",
            show(row["exact_match"], ".1%"), show((row["peak_memory_bytes"] or float("nan")) / 2**20, ".0f"),
        )  # fmt: skip
    return view
