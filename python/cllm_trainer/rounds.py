"""On-policy rounds: collect with the current student, train it, repeat."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from cllm_kernels import JacobiConfig
from cllm_kernels.comparison import load_model

from .collect import collect
from .rows import read_rows
from .settings import TrainConfig
from .train import train


def rounds(
    model: str | Path,
    prompts: list[list[int]],
    output: str | Path,
    count: int,
    jacobi: JacobiConfig,
    config: TrainConfig,
    max_new_tokens: int = 256,
    truths: list[list[int]] | None = None,
) -> list[dict]:
    """``count`` rounds from the checkpoint ``model`` on; returns one summary a round.

    Round ``i`` writes ``rows.jsonl`` and a model to ``output/round-i``, with seeds of its own. Rounds that are there
    are not made again, so the same call goes on after an interruption. With ``config.target_weight`` the first
    ``model`` is the target of all rounds.
    """
    output, summaries, current = Path(output), [], Path(model)
    for number in range(1, count + 1):
        folder = output / f"round-{number}"
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            student, tokenizer = load_model(current)
            seeded = dataclasses.replace(jacobi, seed=(jacobi.seed or 0) + number)
            rows = folder / "rows.jsonl"
            summary = {"round": number, "start": str(current)}
            if not rows.exists():
                summary |= collect(student, tokenizer, prompts, rows, seeded, 64, max_new_tokens, truths=truths)
            own = dataclasses.replace(config, seed=config.seed + number)
            target = load_model(model)[0] if config.target_weight > 0 else None
            train(student, tokenizer, read_rows(rows), folder, own, summary, target, resume=True)
        record = json.loads((folder / "training_record.json").read_text())
        summaries.append(
            {
                "model": str(folder),
                **{key: record.get(key) for key in ("round", "tokens_per_forward", "degenerate", "steps")},
            }
        )
        current = folder
    return summaries
