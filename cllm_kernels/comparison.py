"""Jacobi decoding beside Hugging Face's generate on the same model, the same prompts and in the same run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .decoding import JacobiConfig, JacobiStatistics
from .integrations.generate import JacobiGenerator, check_lengths
from .spider import exact_match, is_degenerate, prompt_for


Inputs, Result = TypeVar("Inputs"), TypeVar("Result")


@dataclasses.dataclass
class _Method:
    """One way to decode, and what it did on each prompt."""

    name: str
    block_size: int
    run: Callable[[dict[str, torch.Tensor]], tuple[list[int], JacobiStatistics | None]]
    tokens: list[list[int]] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    runs: list[JacobiStatistics] = dataclasses.field(default_factory=list)


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict],
    name: str,
    block_size: int = 16,
    max_new_tokens: int = 256,
    rounds: int = 1,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[dict]:
    """Decodes each question greedily by ``hf_ar``, ``jacobi_window`` and ``jacobi_block``, one after the other.

    The methods take turns on each prompt, so that a busy machine slows them alike. A prompt's time is the
    median over ``rounds``. One warm-up prompt is not counted.

    Args:
        questions: rows as :func:`cllm_kernels.spider.read_questions` gives them.
        name: what to call the model in the rows.
        progress: wraps the iteration over prompts, such as ``tqdm``.

    Returns:
        One row a method: ``method``, ``model``, ``block_size``, ``prompts``, ``tokens_per_forward``,
        ``tokens_per_second``, ``speedup`` (ratio of tokens per second to ``hf_ar``), ``speedup_quartiles``
        (of the per-prompt time ratios), ``equal`` (share of outputs equal to ``hf_ar``), ``exact_match``,
        ``degenerate`` (shares), ``fast_forwarded``, ``stationary``, ``paper_fast_forwarded``,
        ``paper_stationary`` (mean tokens a prompt), ``correct`` (exact match of each prompt), ``rounds``, and
        the device, threads, backend and versions.
    """

    def ar(inputs):
        sequences = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        return sequences[0, inputs["input_ids"].shape[1] :].tolist(), None

    def jacobi(mode):
        generator = JacobiGenerator(model, JacobiConfig(block_size=block_size, mode=mode))

        def run(inputs):
            sequences = generator.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
            return sequences[0, inputs["input_ids"].shape[1] :].tolist(), generator.statistics

        return run

    methods = [
        _Method("hf_ar", 1, ar),
        _Method("jacobi_window", block_size, jacobi("window")),
        _Method("jacobi_block", block_size, jacobi("block")),
    ]
    prompts = [[prompt_for(row)] for row in questions]
    encoded = encode(model, tokenizer, prompts, max_new_tokens, [JacobiConfig(block_size=block_size)])
    turns = take_turns([method.run for method in methods], encoded, rounds, model.device, progress)
    for method, own in zip(methods, turns, strict=True):
        method.seconds = [statistics.median(seconds for seconds, _ in prompt) for prompt in own]
        method.tokens = [prompt[0][1][0] for prompt in own]
        method.runs = [prompt[0][1][1] for prompt in own if prompt[0][1][1] is not None]
    return [_row(method, methods[0], questions, tokenizer, model, name, rounds) for method in methods]


def take_turns(
    runs: list[Callable[[Inputs], Result]],
    inputs: list[Inputs],
    rounds: int,
    device: torch.device,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[list[list[tuple[float, Result]]]]:
    """Seconds and results of each function on each input, ``rounds`` times: ``[function][input][round]``.

    The functions take turns on each input, so that a busy machine slows them alike. Each first runs on the first input,
    which is not counted. Garbage is collected before each input, and not while a function runs, as by `timeit`: a full
    collection takes as long as decoding several short outputs.
    """
    for run in runs:
        run(inputs[0])
    found: list[list[list[tuple[float, Result]]]] = [[] for _ in runs]
    with _no_collections():
        for one in progress(inputs):
            gc.collect()
            for own in found:
                own.append([])
            for _ in range(rounds):
                for run, own in zip(runs, found, strict=True):
                    _wait(device)
                    begin = time.perf_counter()
                    result = run(one)
                    _wait(device)
                    own[-1].append((time.perf_counter() - begin, result))
    return found


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Garbage is collected where the caller says so, among what was made since."""
    collects = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load_model(
    path: str | Path, dtype: torch.dtype | str = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer; in fp32, Jacobi and AR decoding give the same tokens without exception.

    Raises:
        ValueError: they cannot be loaded; the message says why.
    """
    with _names(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device), tokenizer


def check_models(paths: Iterable[str | Path]) -> None:
    """Raises ValueError where the configuration or the tokenizer of a model cannot be loaded. Weights are not, so that
    it can be known at once of models which take their turns."""
    for path in paths:
        with _names(path):
            AutoConfig.from_pretrained(path)
            AutoTokenizer.from_pretrained(path)


@contextlib.contextmanager
def _names(path: str | Path) -> Iterator[None]:
    """Says which model could not be loaded. Files that are broken make transformers and what it calls raise anything:
    KeyError, TypeError, errors of safetensors, pickle and huggingface_hub."""
    try:
        yield
    except Exception as error:
        where = path if Path(path).exists() else f"{path} (there is no such folder)"
        raise ValueError(f"no model can be loaded from {where}: {type(error).__name__}: {error}") from error


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[list[str]],
    max_new_tokens: int,
    configs: Iterable[JacobiConfig],
) -> list[dict[str, torch.Tensor]]:
    """What ``generate`` takes for batches of prompts: ids and mask ``[B, P]``, padded on the left.

    Raises:
        ValueError: a prompt has no tokens, or more than the model has positions for, with the new tokens behind it.
        NotImplementedError: Jacobi decoding does not know these positions.
    """
    encoded = []
    for texts in batches:
        inputs = tokenizer(
            texts, return_tensors="pt", padding=len(texts) > 1, padding_side="left", return_token_type_ids=False
        )
        lengths = inputs["attention_mask"].sum(1).tolist()
        if not all(lengths):
            raise ValueError(f"the prompt {texts[lengths.index(0)]!r} has no tokens")
        for config in configs:
            check_lengths(model, max(lengths), max_new_tokens, config)
        encoded.append(dict(inputs.to(model.device)))
    return encoded


def compare_models(
    models: dict[str, str | Path],
    questions: list[dict],
    block_size: int = 16,
    max_new_tokens: int = 256,
    rounds: int = 1,
    progress: Callable[[Iterable, str], Iterable] = lambda items, name: items,
) -> list[dict]:
    """The rows of :func:`compare` for each checkpoint of ``models`` (name to path), in fp32."""
    check_models(models.values())
    rows = []
    for name, path in models.items():
        model, tokenizer = load_model(path)
        wrap = functools.partial(progress, name=name)
        rows += compare(model, tokenizer, questions, name, block_size, max_new_tokens, rounds, wrap)
    return rows


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _row(
    method: _Method,
    baseline: _Method,
    questions: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    name: str,
    rounds: int,
) -> dict:
    speed, baseline_speed = (sum(map(len, m.tokens)) / sum(m.seconds) for m in (method, baseline))
    ratios = [base / own for base, own in zip(baseline.seconds, method.seconds, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    texts = tokenizer.batch_decode(method.tokens, skip_special_tokens=True)
    correct = [exact_match(text, row["query"]) for text, row in zip(texts, questions, strict=True)]

    def share(flags: Iterable[bool]) -> float:
        return sum(flags) / len(questions)

    def mean(count: Callable[[JacobiStatistics], int]) -> float:
        return sum(map(count, method.runs)) / len(questions)

    return {
        "method": method.name,
        "model": name,
        "block_size": method.block_size,
        "prompts": len(questions),
        "tokens_per_forward": sum(map(len, method.tokens)) / sum(run.iterations for run in method.runs)
        if method.runs
        else 1.0,
        "tokens_per_second": speed,
        "speedup": speed / baseline_speed,
        "speedup_quartiles": quartiles,
        "equal": share(own == base for own, base in zip(method.tokens, baseline.tokens, strict=True)),
        "exact_match": share(correct),
        "degenerate": share(is_degenerate(tokens) for tokens in method.tokens),
        "fast_forwarded": mean(lambda run: run.fast_forwarded),
        "stationary": mean(lambda run: run.stationary),
        "paper_fast_forwarded": mean(lambda run: run.paper_fast_forwarded),
        "paper_stationary": mean(lambda run: run.paper_stationary),
        "correct": correct,
        "rounds": rounds,
        "backend": method.runs[0].backend if method.runs else "transformers",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
