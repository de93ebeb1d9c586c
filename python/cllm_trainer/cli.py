"""The ``cllm-train`` command: collect, train, evaluate, and the recipe of the bundled models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from cllm_kernels import JacobiConfig
from cllm_kernels.comparison import compare_models, load_model
from cllm_kernels.spider import prompt_for, read_questions

from . import spider as _spider
from .collect import collect as _collect
from .collect import prompts_of, tqdm_of
from .rows import read_rows
from .train import TrainConfig
from .train import train as _train

app = typer.Typer(help="Trains Consistency LLMs.", no_args_is_help=True, add_completion=False)
_DEFAULT = TrainConfig()


@app.command()
def collect(
    model: Annotated[Path, typer.Option(help="Checkpoint of the target.")],
    prompts: Annotated[Path, typer.Option(help='JSONL with {"prompt": text}, or questions in the Spider format.')],
    output: Annotated[Path, typer.Option(help="Training rows go here, as JSONL.")],
    block_size: Annotated[int, typer.Option(min=2)] = 16,
    mode: Annotated[str, typer.Option(help="window or block.")] = "window",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: int = 0,
) -> None:
    """Records the Jacobi trajectories of prompts."""
    loaded, tokenizer = load_model(model)
    with open(prompts, encoding="utf-8") as file:
        first = json.loads(file.readline())
    if "prompt" in first:
        texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    else:
        texts = [prompt_for(row) for row in read_questions(prompts)]
    config = JacobiConfig(block_size=block_size, mode=mode, seed=seed)
    summary = _collect(loaded, tokenizer, prompts_of(tokenizer, texts), output, config, batch_size, max_new_tokens)
    typer.echo(json.dumps(summary))


@app.command()
def train(
    model: Annotated[Path, typer.Option(help="Checkpoint to start from.")],
    data: Annotated[Path, typer.Option(help="Training rows that collect wrote.")],
    output: Annotated[Path, typer.Option(help="The checkpoint goes here.")],
    epochs: float = _DEFAULT.epochs,
    batch_size: Annotated[int, typer.Option(min=1)] = _DEFAULT.batch_size,
    learning_rate: float = _DEFAULT.learning_rate,
    noisy_blocks: Annotated[int, typer.Option(min=0)] = _DEFAULT.noisy_blocks,
    augment: Annotated[float, typer.Option(min=0, max=1)] = _DEFAULT.augment,
    on_policy: bool = _DEFAULT.on_policy,
    consistency_weight: Annotated[float, typer.Option(min=0)] = _DEFAULT.consistency_weight,
    distance_decay: Annotated[float, typer.Option(min=0, max=1)] = _DEFAULT.distance_decay,
    ar_weight: Annotated[float, typer.Option(min=0)] = _DEFAULT.ar_weight,
    target: Annotated[Path | None, typer.Option(help="Checkpoint that --target-weight holds the model to.")] = None,
    target_weight: Annotated[float, typer.Option(min=0)] = _DEFAULT.target_weight,
    seed: int = _DEFAULT.seed,
) -> None:
    """Fine-tunes with the consistency and autoregressive losses."""
    if (target_weight > 0) != (target is not None):
        raise typer.BadParameter("--target and --target-weight above 0 go together")
    loaded, tokenizer = load_model(model)
    config = TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        noisy_blocks=noisy_blocks,
        augment=augment,
        on_policy=on_policy,
        consistency_weight=consistency_weight,
        distance_decay=distance_decay,
        ar_weight=ar_weight,
        target_weight=target_weight,
        seed=seed,
    )
    notes = {"data": str(data), "start": str(model), "target": target and str(target)}
    _train(loaded, tokenizer, read_rows(data), output, config, notes, target=target and load_model(target)[0])


@app.command()
def evaluate(
    target: Annotated[Path, typer.Option(help="Checkpoint of the target.")],
    cllm: Annotated[Path, typer.Option(help="Checkpoint of the CLLM.")],
    questions: Annotated[Path, typer.Option(help="JSONL with db_id, question, query.")],
    output: Annotated[Path, typer.Option(help="The rows go here, as JSON.")],
    block_size: Annotated[int, typer.Option(min=2)] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    rounds: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Compares a target and its CLLM: exact match, tokens per forward, speed over AR."""
    models = {"target": target, "cllm": cllm}
    rows = compare_models(models, read_questions(questions), block_size, max_new_tokens, rounds, tqdm_of)
    output.write_text(json.dumps(rows, indent=1) + "\n")


@app.command()
def spider(
    data: Annotated[Path, typer.Option(help="Folder with Spider's train.jsonl and tables.json.")],
    output: Annotated[Path, typer.Option(help="spider-target and spider-cllm go here.")] = Path("models"),
    work: Annotated[Path, typer.Option(help="Trajectories go here.")] = Path("runs/spider"),
    stage: Annotated[str, typer.Option(help="target, cllm, evaluate, or all of them in turn.")] = "all",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Makes the bundled models: target from scratch, trajectories, CLLM, evaluation."""
    if stage not in ("all", "target", "cllm", "evaluate"):
        raise typer.BadParameter(f"{stage!r} is not one of all, target, cllm, evaluate")
    if threads:
        torch.set_num_threads(threads)
    if stage in ("all", "target"):
        _spider.build_target(data, output / "spider-target")
    if stage in ("all", "cllm"):
        _spider.build_cllm(data, output / "spider-target", output / "spider-cllm", work)
    if stage in ("all", "evaluate"):
        _spider.evaluate_models(data, output)


def main() -> None:
    """Entry point of the ``cllm-train`` command."""
    app()
