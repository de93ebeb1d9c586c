"""A target and its CLLM on a task, beside baselines: quality, tokens per forward, speed, and where it comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm_kernels import JacobiConfig, JacobiGenerator, JacobiStatistics
from cllm_kernels.comparison import check_models, encode, load_model, take_turns
from cllm_kernels.spider import is_degenerate

from .baselines import MedusaHeads, medusa_generate
from .tasks import Task

Decode = Callable[[dict[str, torch.Tensor]], tuple[list[int], int, JacobiStatistics | None]]


@dataclasses.dataclass
class _Method:
    """A way to decode, and what it did on each prompt: tokens, forwards of the model, seconds, counts."""

    name: str
    decode: Decode
    tokens: Sequence[list[int]] = ()
    forwards: Sequence[int] = ()
    seconds: list[float] = dataclasses.field(default_factory=list)
    runs: list[JacobiStatistics] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def _counting(model: PreTrainedModel) -> Iterator[list[int]]:
    forwards = [0]

    def count(*_) -> None:
        forwards[0] += 1

    handle = model.register_forward_pre_hook(count)
    try:
        yield forwards
    finally:
        handle.remove()


def _methods(
    model: PreTrainedModel, block_size: int, max_new_tokens: int, lookup: bool, draft: PreTrainedModel | None,
    medusa: MedusaHeads | None,
) -> list[_Method]:  # fmt: skip
    def generate(**options) -> Decode:
        def decode(inputs):
            with _counting(model) as forwards:
                sequences = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, **options)
            return sequences[0, inputs["input_ids"].shape[1] :].tolist(), forwards[0], None

        return decode

    def jacobi(mode: str) -> Decode:
        generator = JacobiGenerator(model, JacobiConfig(block_size=block_size, mode=mode))

        def decode(inputs):
            sequences = generator.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            run = generator.statistics
            return sequences[0, inputs["input_ids"].shape[1] :].tolist(), run.forwards, run

        return decode

    def heads(inputs):
        eos = model.generation_config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
        return *medusa_generate(model, medusa, inputs["input_ids"], max_new_tokens, eos), None

    methods = [
        _Method("hf_ar", generate()),
        _Method("jacobi_window", jacobi("window")),
        _Method("jacobi_block", jacobi("block")),
    ]
    if lookup:
        methods.append(_Method("prompt_lookup", generate(prompt_lookup_num_tokens=block_size - 1)))
    if draft is not None:
        methods.append(_Method("draft_model", generate(assistant_model=draft)))
    if medusa is not None:
        methods.append(_Method("medusa", heads))
    return methods


def evaluate(
    models: dict[str, str | Path],
    task: Task,
    block_size: int = 16,
    max_new_tokens: int = 256,
    rounds: int = 1,
    lookup: bool = False,
    draft: str | Path | None = None,
    medusa: str | Path | None = None,
) -> list[dict]:
    """Decodes the task's prompts greedily, in fp32 and one by one, with every model of ``models`` (name to path).

    The methods take turns on each prompt, so that a busy machine slows them alike; a prompt's time is the median over
    ``rounds``, and one warm-up prompt is not counted. ``lookup``, ``draft`` and ``medusa`` (paths) add baselines to
    the first model, which is the target.

    Returns:
        One row a model and method: ``model``, ``method``, ``block_size``, ``prompts``, ``tokens_per_forward``,
        ``tokens_per_second``, ``speedup`` over ``hf_ar`` of the same model and ``speedup_over_target`` over that of
        the first, ``equal`` (share of outputs equal to ``hf_ar``), ``degenerate``, ``measures`` (mean of each measure
        of the task over the outputs of which something can be said, with their count), for Jacobi decoding
        ``fast_forwarded``, ``stationary`` and both by the paper's definition (tokens a prompt), and the machine.

    Raises:
        ValueError: a model cannot be loaded, a prompt is empty or too long for it, or a draft or heads do not fit the
            target.
    """
    check_models(models.values())
    rows: list[dict] = []
    target = None
    for name, path in models.items():
        model, tokenizer = load_model(path)
        first = target is None
        target = target or model
        drafter = load_model(draft)[0] if first and draft is not None else None
        if drafter is not None and drafter.config.vocab_size != model.config.vocab_size:
            raise ValueError(f"the draft has {drafter.config.vocab_size} tokens, the target {model.config.vocab_size}")
        heads = MedusaHeads.load(medusa) if first and medusa is not None else None
        if heads is not None and heads.blocks[0].in_features != model.config.hidden_size:
            raise ValueError(f"the heads are {heads.blocks[0].in_features} wide, the target {model.config.hidden_size}")
        methods = _methods(model, block_size, max_new_tokens, first and lookup, drafter, heads)
        prompts = [[text] for text in task.prompts()]
        encoded = encode(model, tokenizer, prompts, max_new_tokens, [JacobiConfig(block_size=block_size)])
        progress = functools.partial(tqdm, desc=f"evaluate {name}", unit="prompt")
        turns = take_turns([method.decode for method in methods], encoded, rounds, model.device, progress)
        for method, own in zip(methods, turns, strict=True):
            method.seconds = [statistics.median(seconds for seconds, _ in prompt) for prompt in own]
            method.tokens, method.forwards, runs = zip(*(prompt[0][1] for prompt in own), strict=True)
            method.runs = [run for run in runs if run is not None]
            rows.append(_row(method, methods[0], rows[0] if rows else None, name, block_size, rounds, model))
            rows[-1]["measures"] = _measures(method, task, tokenizer, target, encoded)
    return rows


def _measures(
    method: _Method, task: Task, tokenizer: PreTrainedTokenizerBase, target: PreTrainedModel, encoded: list[dict]
) -> dict[str, dict]:
    texts = tokenizer.batch_decode(method.tokens, skip_special_tokens=True)
    found = {}
    for name, values in task.score(texts).items():
        known = [value for value in values if value is not None]
        found[name] = {"mean": sum(known) / len(known) if known else None, "count": len(known)}
    if task.measure == "perplexity":
        found["perplexity"] = {"mean": perplexity(target, encoded, method.tokens), "count": len(encoded)}
    return found


@torch.inference_mode()
def perplexity(target: PreTrainedModel, encoded: list[dict], outputs: list[list[int]]) -> float:
    """Of outputs under ``target``, over all their tokens."""
    total = count = 0
    for inputs, tokens in zip(encoded, outputs, strict=True):
        prompt = inputs["input_ids"][0]
        ids = torch.cat((prompt, torch.tensor(tokens, device=prompt.device)))
        logs = target(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        total -= logs.gather(1, ids[len(prompt) :, None]).sum().item()
        count += len(tokens)
    return math.exp(total / count)


def _row(
    method: _Method,
    ar: _Method,
    target_ar: dict | None,
    name: str,
    block_size: int,
    rounds: int,
    model: PreTrainedModel,
) -> dict:
    prompts = len(method.tokens)
    tokens = sum(map(len, method.tokens))
    speed = tokens / sum(method.seconds)
    row = {
        "model": name,
        "method": method.name,
        "block_size": 1 if method is ar else block_size,
        "prompts": prompts,
        "tokens": tokens,
        "tokens_per_forward": tokens / sum(method.forwards),
        "tokens_per_second": speed,
        "speedup": speed / (sum(map(len, ar.tokens)) / sum(ar.seconds)),
        "speedup_over_target": speed / (target_ar["tokens_per_second"] if target_ar else speed),
        "equal": sum(own == base for own, base in zip(method.tokens, ar.tokens, strict=True)) / prompts,
        "degenerate": sum(map(is_degenerate, method.tokens)) / prompts,
    }
    if method.runs:
        for key in ("fast_forwarded", "stationary", "paper_fast_forwarded", "paper_stationary"):
            row[key] = sum(getattr(run, key) for run in method.runs) / prompts
    return row | {
        "rounds": rounds,
        "parameters": model.num_parameters(),
        "backend": method.runs[0].backend if method.runs else "transformers",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def tables(rows: list[dict], task: Task) -> str:
    """Markdown: a table in the shape of the paper's table 1 (speed and quality), one in that of its table 3."""
    measures = list(rows[0]["measures"])
    head = ["model", "method", "n", "tokens/s", "speed-up over the target's AR", "over its own AR",
            "tokens per forward",
            "equal to AR", "degenerate", *measures]  # fmt: skip
    lines = [
        f"**{task.name}**, {rows[0]['prompts']} prompts, batch 1, {rows[0]['dtype']} (Kou et al. 2024, table 1)",
        "",
    ]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["model"], row["method"], str(row["block_size"]), f"{row['tokens_per_second']:.0f}",
                 f"{row['speedup_over_target']:.2f}x", f"{row['speedup']:.2f}x", f"{row['tokens_per_forward']:.2f}",
                 f"{row['equal']:.1%}", f"{row['degenerate']:.1%}"]  # fmt: skip
        for name in measures:
            mean, count = row["measures"][name]["mean"], row["measures"][name]["count"]
            text = "–" if mean is None else f"{mean:.2f}" if name == "perplexity" else f"{mean:.1%}"
            cells.append(text if count == row["prompts"] else f"{text} of {count}")
        lines.append("| " + " | ".join(cells) + " |")
    head = [
        "model",
        "method",
        "fast-forwarded (paper)",
        "stationary (paper)",
        "fast-forwarded (ours)",
        "stationary (ours)",
    ]
    lines += ["", "Tokens a prompt (Kou et al. 2024, table 3; ours looks at drafts and counts the verifying pass)", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        if "stationary" in row:
            keys = ("paper_fast_forwarded", "paper_stationary", "fast_forwarded", "stationary")
            lines.append("| " + " | ".join([row["model"], row["method"], *(f"{row[key]:.1f}" for key in keys)]) + " |")
    return "\n".join(lines) + "\n"


def write_report(rows: list[dict], task: Task, path: str | Path) -> None:
    """The rows as JSON to ``path``, and the tables beside it, as Markdown."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables(rows, task))
