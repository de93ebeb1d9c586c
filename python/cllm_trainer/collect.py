"""Collects Jacobi trajectories through JacobiGenerator."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm_kernels import JacobiConfig, JacobiGenerator
from cllm_kernels.integrations.generate import check_lengths
from cllm_kernels.spider import is_degenerate

from .packing import initial_states
from .rows import correct_later, fingerprint, read_rows

REPEATS = (
    10  # the run that the paper's code takes for a repetition (github.com/hao-ai-lab/Consistency_LLM, cllm/utils.py)
)


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    output: str | Path,
    config: JacobiConfig,
    batch_size: int = 64,
    max_new_tokens: int = 256,
    augment: bool = False,
    sampling: dict | None = None,
    truths: list[list[int]] | None = None,
    prefix_lengths: list[int] | None = None,
) -> dict:
    """Decodes every prompt and writes one training row each (see :mod:`cllm_trainer.rows`).

    Rows come in order of prompt length, since prompts of a length share a batch. ``output`` appears when all of
    them are written; until then they are in ``output`` with ``.part`` behind it, where the same call goes on after an
    interruption at any moment. Each row depends on its prompt and number alone, so the file is the same as without
    the interruption. Where ``output`` holds all rows of the same call already, nothing is decoded. Outputs that run into
    repetition are marked ``degenerate``, counted, and kept: whoever trains leaves them out (:func:`without_degenerate`).

    Args:
        prompts: token ids.
        config: block size, mode, draft source and seed that the trajectories come from.
        augment: adds to each state a copy of which half of the later wrong drafts are set right
            (:func:`cllm_trainer.rows.correct_later`; Kou et al. 2024, section 3.2.1).
        sampling: ``temperature``, ``top_k`` and what else ``generate`` takes, to sample; greedy without.
        truths: token ids of a ground truth for each prompt, for ``truth_ids``.
        prefix_lengths: how many tokens each prompt shares with others at its beginning, for ``prefix_length``.

    Returns:
        ``prompts``, ``tokens``, ``tokens_per_forward``, ``unfinished`` (outputs cut at ``max_new_tokens``),
        ``degenerate``.

    Raises:
        ValueError: no prompts, an empty one, one too long for the model's positions, or the ``.part`` was left by a run
            with other settings.
        OSError: it could not be written, such as on a full disk; what was written whole stays.
    """
    if not prompts or not all(prompts):
        raise ValueError("no prompts, or an empty one")
    if truths is not None and len(truths) != len(prompts):
        raise ValueError(f"there are {len(truths)} truths for {len(prompts)} prompts")
    if prefix_lengths is not None and len(prefix_lengths) != len(prompts):
        raise ValueError(f"there are {len(prefix_lengths)} prefix lengths for {len(prompts)} prompts")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; they do not belong "
            "together"
        )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    common = {"block_size": config.block_size, "mode": config.mode, "tokenizer": fingerprint(tokenizer)}
    common["run"] = _run_id(
        model, prompts, config, max_new_tokens, augment, sampling, truths, prefix_lengths, common["tokenizer"]
    )
    found = _rows_of(Path(output), common["run"], order)
    if found and found[0]["prompts"] == len(order):
        return _summary(found[0])
    generator = JacobiGenerator(model, config)
    check_lengths(model, len(prompts[order[-1]]), max_new_tokens, config)
    temporary = Path(f"{output}.part")
    counts = _resume(temporary, common["run"], order)
    options = {"do_sample": True, **sampling} if sampling else {"do_sample": False}
    seed = config.seed if isinstance(config.seed, int) else 0
    bar = tqdm(total=len(prompts), initial=counts["prompts"], unit="prompt", desc="collect")
    with bar, temporary.open("ab", buffering=0) as file:
        for first in range(counts["prompts"], len(order), batch_size):
            numbers = order[first : first + batch_size]
            batch = [prompts[index] for index in numbers]
            inputs = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt").to(model.device)
            sequences = generator.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                record_trajectory=True,
                seed=[_row_seed(seed, number) for number in numbers],  # its own, so that batches do not matter
                **options,
            )
            width = inputs["input_ids"].shape[1]
            lines = []
            for number, prompt, sequence, row, states in zip(
                numbers, batch, sequences.tolist(), generator.statistics.rows, generator.trajectory, strict=True
            ):
                tokens = sequence[width : width + row.tokens]
                if augment:
                    rng = random.Random(_row_seed(seed, number))
                    states = [part for s in states for part in (s, correct_later(*s, tokens, 0.5, rng))]
                line = {
                    "id": number,
                    "prompt_ids": prompt,
                    "output_ids": tokens,
                    "states": states,
                    "finished": row.stopped_by == "eos",
                    "degenerate": is_degenerate(tokens, repeats=REPEATS),
                    "iterations": row.iterations,
                    **common,
                }
                if truths is not None:
                    line["truth_ids"] = truths[number]
                if prefix_lengths is not None:
                    line["prefix_length"] = prefix_lengths[number]
                lines.append(line)
                _count(counts, line)
            _append(file, temporary, lines, counts["prompts"] - len(lines))
            bar.update(len(batch))
            bar.set_postfix_str(f"{counts['tokens'] / counts['iterations']:.2f} tokens/forward")
    os.replace(temporary, output)
    return _summary(counts)


def _summary(counts: dict) -> dict:
    iterations = counts.pop("iterations")
    return {**counts, "tokens_per_forward": counts["tokens"] / iterations}


def _row_seed(seed: int, number: int) -> int:
    return (seed + 0x9E3779B1 * number) % 2**32  # the golden ratio: neighbours get far-off seeds


def _run_id(
    model: PreTrainedModel, prompts: list, config: JacobiConfig, max_new_tokens: int, augment: bool,
    sampling: dict | None, truths: list | None, prefix_lengths: list | None, tokenizer: str,
) -> str:  # fmt: skip
    """16 hex digits of everything that the rows depend on; of the weights a checksum stands in."""
    weights = [float(parameter.detach().double().abs().sum()) for parameter in model.parameters()]
    settings = dataclasses.asdict(dataclasses.replace(config, backend="auto"))
    text = json.dumps(
        [weights, prompts, settings, max_new_tokens, augment, sampling, truths, prefix_lengths, tokenizer]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _count(counts: dict, row: dict) -> None:
    counts["prompts"] += 1
    counts["tokens"] += len(row["output_ids"])
    counts["iterations"] += row["iterations"]
    counts["unfinished"] += not row["finished"]
    counts["degenerate"] += row["degenerate"]


def _rows_of(path: Path, run: str, order: list[int]) -> tuple[dict, int] | None:
    """What a file holds of this run, counted, and the bytes of its whole lines; None if it has others' rows."""
    counts = dict.fromkeys(("prompts", "tokens", "iterations", "unfinished", "degenerate"), 0)
    whole = 0
    if not path.exists():
        return counts, whole
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
            except ValueError:
                return None
            number = counts["prompts"]
            if not isinstance(row, dict) or row.get("run") != run or number >= len(order) or row.get("id") != order[number]:
                return None
            _count(counts, row)
            whole += len(line)
    return counts, whole


def _resume(temporary: Path, run: str, order: list[int]) -> dict:
    """What an interrupted run left, counted; the line it was cut in is taken away."""
    found = _rows_of(temporary, run, order)
    if found is None:
        raise ValueError(
            f"{temporary} was left by a run with another model, other prompts or settings; finish that run or remove the file"
        )
    counts, whole = found
    if temporary.exists():
        os.truncate(temporary, whole)
    return counts


def _append(file, temporary: Path, lines: list[dict], before: int) -> None:
    """All lines or none, on the disk when this returns."""
    whole = file.tell()
    try:
        data = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode())
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError as error:
        os.truncate(temporary, whole)
        raise OSError(
            error.errno,
            f"{error.strerror}; {temporary} keeps the first {before} rows, and the same call goes on from there",
        ) from None


def collect_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], output: str | Path,
    max_new_tokens: int, prefix_lengths: list[int] | None = None,
) -> tuple[list[dict], dict]:  # fmt: skip
    """A model's own answers to prompts as training rows, and what :func:`collect` found, which writes them to ``output``.

    Answers without an end and repetitions are left out.
    """
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    prompts = prompts_of(tokenizer, texts)
    # Only the answers are wanted, and blocks of 2 come to them at the least cost.
    config = JacobiConfig(block_size=2)
    summary = collect(
        model, tokenizer, prompts, output, config, max_new_tokens=max_new_tokens, prefix_lengths=prefix_lengths
    )
    rows = [row for row in read_rows(output) if row["finished"] and not is_degenerate(row["output_ids"])]
    return rows, summary


def with_first_states(rows: list[dict], block_size: int) -> list[dict]:
    """The rows with blocks of random drafts, as decoding begins; ``on_policy`` moves them on while a model is trained."""
    rng = random.Random(0)
    return [row | {"states": initial_states(row, block_size, rng), "block_size": block_size} for row in rows]


def without_degenerate(rows: list[dict]) -> tuple[list[dict], int]:
    """The rows that do not run into repetition, and how many do."""
    kept = [row for row in rows if not row.get("degenerate")]
    if not kept:
        raise ValueError(f"all {len(rows)} rows run into repetition")
    return kept, len(rows) - len(kept)


def prompts_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of prompts."""
    return tokenizer(texts, return_token_type_ids=False)["input_ids"]


def tqdm_of(items: list, name: str) -> tqdm:
    """A progress bar over prompts, for :func:`cllm_kernels.comparison.compare_models`."""
    return tqdm(items, desc=f"evaluate {name}", unit="prompt")
