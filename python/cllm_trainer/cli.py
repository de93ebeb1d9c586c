"""The ``cllm-train`` command: collect, train, rounds, evaluate, and the recipe of the bundled models."""

import dataclasses
import functools
import inspect
import json
import tempfile
import typing
from pathlib import Path
from typing import Annotated

import torch
import typer

from cllm_kernels import JacobiConfig
from cllm_kernels.cli.commands import Commands, apart, fail, file_in_new_folder, output_file, output_folder
from cllm_kernels.comparison import load_model
from cllm_kernels.spider import prompt_for, read_jsonl, read_questions

from . import gsm8k as _gsm8k
from . import spider as _spider
from .baselines import distil_draft, train_medusa
from .collect import collect as _collect
from .collect import prompts_of
from .evaluate import evaluate as _evaluate
from .evaluate import tables, write_report
from .rounds import rounds as _rounds
from .rows import read_rows, to_cllm
from .settings import TrainConfig, describe, read_settings
from .tasks import TASKS, load_task
from .train import Collapsed
from .train import train as _train


class _Commands(Commands):
    """An alarm that stops a training is no bad input, but what the training came to: exit code 1."""

    def invoke(self, ctx: typer.Context) -> object:
        try:
            return super().invoke(ctx)
        except Collapsed as error:
            fail(str(error), 1)


app = typer.Typer(cls=_Commands, help="Trains Consistency LLMs.", no_args_is_help=True, add_completion=False)

_INPUT = {"exists": True, "dir_okay": False}
SETTINGS = typer.Option(help="YAML file of settings (cllm-train settings prints one); options go over it.", **_INPUT)
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1)]


def _settings_as_options(function):
    """Gives a command one option for each setting of TrainConfig; it gets those that were passed as ``changes``."""
    own = inspect.signature(function)
    hints = typing.get_type_hints(TrainConfig)
    fields = dataclasses.fields(TrainConfig)
    parameters = [parameter for name, parameter in own.parameters.items() if name != "changes"]
    for field in fields:
        allowed = field.metadata["allowed"]
        choices = f" ({', '.join(allowed)})" if allowed and isinstance(allowed[0], str) else ""
        text = f"{field.metadata['meaning']}{choices}; default {field.default}: {field.metadata['source']}"
        kind = next(kind for kind in (*typing.get_args(hints[field.name]), hints[field.name]) if isinstance(kind, type))
        annotation = Annotated[kind | None, typer.Option(help=text, show_default=False)]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )

    @functools.wraps(function)
    def command(**options):
        changes = {field.name: options.pop(field.name) for field in fields}
        function(**options, changes={name: value for name, value in changes.items() if value is not None})

    command.__signature__ = own.replace(parameters=parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del command.__wrapped__
    return command


def _read_prompts(path: Path, tokenizer) -> tuple[list[list[int]], list[list[int]] | None]:
    """Token ids of the prompts of a file, and of the ground truths, where every line has one under ``truth``."""
    rows = read_jsonl(path)
    if "prompt" not in next(iter(rows.values())):
        return prompts_of(tokenizer, [prompt_for(row) for row in read_questions(path)]), None
    for number, row in rows.items():
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("truth"), str | None):
            raise ValueError(f'{path}:{number}: not {{"prompt": text}}, with another text under truth if it is known')
    prompts = prompts_of(tokenizer, [row["prompt"] for row in rows.values()])
    empty = [number for number, ids in zip(rows, prompts, strict=True) if not ids]
    if empty:
        raise ValueError(f"{path}:{empty[0]}: the prompt has no tokens")
    truths = [row.get("truth") for row in rows.values()]
    if None in truths:
        return prompts, None
    if tokenizer.eos_token_id is None:
        raise ValueError("truths end with an EOS token, and the tokenizer has none")
    encoded = tokenizer(truths, add_special_tokens=False)["input_ids"]
    return prompts, [ids + [tokenizer.eos_token_id] for ids in encoded]


@app.command()
def collect(
    model: Annotated[Path, typer.Option(help="Checkpoint of the target.")],
    prompts: Annotated[
        Path, typer.Option(help='JSONL with {"prompt": text}, and "truth" if known, or Spider questions.', **_INPUT)
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="Training rows go here, as JSONL. The same call goes on after an interruption.", callback=output_file
        ),
    ],
    block_size: Annotated[int, typer.Option(min=2)] = 16,
    mode: Annotated[str, typer.Option(help="window or block.")] = "window",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    augment: Annotated[bool, typer.Option(help="Adds states with half of the later wrong drafts set right.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0, help="Samples; greedy without.")] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Of sampling; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Of sampling.")] = 1.0,
    cllm_json: Annotated[
        Path | None, typer.Option(help="Also writes the original CLLM format here.", callback=output_file)
    ] = None,
    seed: Seed = 0,
) -> None:
    """Records the Jacobi trajectories of prompts."""
    apart(output, prompts, cllm_json)
    apart(cllm_json, prompts)
    config = JacobiConfig(block_size=block_size, mode=mode, seed=seed)
    loaded, tokenizer = load_model(model)
    ids, truths = _read_prompts(prompts, tokenizer)
    sampling = None if temperature is None else {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    summary = _collect(loaded, tokenizer, ids, output, config, batch_size, max_new_tokens, augment, sampling, truths)
    if cllm_json is not None:
        summary["cllm_entries"] = to_cllm(read_rows(output), cllm_json, tokenizer.pad_token_id or 0)
    typer.echo(json.dumps(summary))


@app.command()
@_settings_as_options
def train(
    *,
    model: Annotated[Path, typer.Option(help="Checkpoint to start from.")],
    data: Annotated[
        Path, typer.Option(help="Rows that collect wrote, or a file in the CLLM or Jacobi Forcing format.", **_INPUT)
    ],
    output: Annotated[Path, typer.Option(help="The checkpoint goes here.", callback=output_folder)],
    target: Annotated[Path | None, typer.Option(help="Checkpoint that --target-weight holds the model to.")] = None,
    settings: Annotated[Path | None, SETTINGS] = None,
    skip_broken: Annotated[bool, typer.Option(help="Leaves broken lines out instead of stopping.")] = False,
    resume: Annotated[bool, typer.Option(help="Goes on from the newest checkpoint (--save-steps).")] = False,
    changes: dict,
) -> None:
    """Fine-tunes with the consistency and autoregressive losses. Runs under accelerate launch and torchrun too."""
    config = read_settings(settings, changes)
    if (config.target_weight > 0) != (target is not None):
        raise ValueError("--target and --target-weight above 0 go together")
    loaded, tokenizer = load_model(model)
    notes = {"data": str(data), "start": str(model), "target": target and str(target)}
    rows = read_rows(data, tokenizer, skip_broken)
    _train(loaded, tokenizer, rows, output, config, notes, target=target and load_model(target)[0], resume=resume)


@app.command()
@_settings_as_options
def rounds(
    *,
    model: Annotated[Path, typer.Option(help="Checkpoint to start from, the target of all rounds.")],
    prompts: Annotated[Path, typer.Option(help="As collect takes them.", **_INPUT)],
    output: Annotated[
        Path,
        typer.Option(
            help="round-1, round-2, ... go here, each with its rows and its model.", callback=output_folder
        ),
    ],
    count: Annotated[int, typer.Option(min=1, help="Rounds.")] = 2,
    n: Annotated[int, typer.Option(min=2, help="Block size that trajectories are collected with.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    settings: Annotated[Path | None, SETTINGS] = None,
    changes: dict,
) -> None:
    """Collects with the current student, trains it, and again. The same call goes on after an interruption."""
    config = read_settings(settings, changes)
    ids, truths = _read_prompts(prompts, load_model(model)[1])
    typer.echo(
        json.dumps(_rounds(model, ids, output, count, JacobiConfig(block_size=n), config, max_new_tokens, truths))
    )


@app.command()
def evaluate(
    target: Annotated[Path, typer.Option(help="Checkpoint of the target.")],
    questions: Annotated[Path, typer.Option(help="JSONL of the task, such as Spider's dev.jsonl.", **_INPUT)],
    output: Annotated[
        Path,
        typer.Option(
            help="The rows go here, as JSON, and the tables beside it, as Markdown.", callback=file_in_new_folder
        ),
    ],
    cllm: Annotated[Path | None, typer.Option(help="Checkpoint of the CLLM; the target alone without.")] = None,
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = "spider",
    schemas: Annotated[
        Path | None,
        typer.Option(help="Spider's tables.json, for the script's set match and to execute queries.", **_INPUT),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Takes the first rows only.")] = None,
    block_size: Annotated[int, typer.Option(min=2)] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    rounds: Annotated[int, typer.Option(min=1)] = 1,
    lookup: Annotated[bool, typer.Option(help="Adds transformers' prompt lookup.")] = False,
    draft: Annotated[
        Path | None, typer.Option(help="Adds speculative decoding with this draft (cllm-train draft).")
    ] = None,
    medusa: Annotated[Path | None, typer.Option(help="Adds these heads (cllm-train medusa).", **_INPUT)] = None,
    plots: Annotated[bool, typer.Option(help="Draws the training, and a trajectory, of the last model.")] = False,
) -> None:
    """Compares a target and its CLLM on a task: quality, tokens per forward, speed, against AR and baselines."""
    apart(output, output.with_suffix(".md"), questions, schemas, medusa)
    loaded = load_task(task, questions, limit, schemas)
    if plots:  # before the work, since a file of others is read
        _plot_training(cllm or target, output)
    models = {"target": target} | ({"cllm": cllm} if cllm else {})
    rows = _evaluate(models, loaded, block_size, max_new_tokens, rounds, lookup, draft, medusa)
    write_report(rows, loaded, output)
    if plots:
        _plot_trajectory(cllm or target, loaded.prompts()[0], output, block_size, max_new_tokens)
    typer.echo(tables(rows, loaded))


def _plot_training(path: Path, output: Path) -> None:
    from .plots import plot_training

    record = path / "training_record.json"
    if record.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            plot_training(json.loads(record.read_bytes()), output.with_name(f"{output.stem}_training.png"))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{record} holds no training to draw ({type(error).__name__}: {error})") from error


def _plot_trajectory(path: Path, prompt: str, output: Path, block_size: int, max_new_tokens: int) -> None:
    from .plots import plot_trajectory

    model, tokenizer = load_model(path)
    with tempfile.TemporaryDirectory() as folder:
        row = Path(folder) / "row.jsonl"
        _collect(
            model,
            tokenizer,
            prompts_of(tokenizer, [prompt]),
            row,
            JacobiConfig(block_size=block_size),
            1,
            max_new_tokens,
        )
        plot_trajectory(read_rows(row)[0], output.with_name(f"{output.stem}_trajectory.png"))


@app.command()
def draft(
    target: Annotated[Path, typer.Option(help="Checkpoint to distil.")],
    data: Annotated[Path, typer.Option(help="Training rows that collect wrote.", **_INPUT)],
    output: Annotated[Path, typer.Option(help="The draft model goes here.", callback=output_folder)],
    layers: Annotated[int, typer.Option(min=1)] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 300,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    seed: Seed = 0,
) -> None:
    """Distils a draft model for the speculative baseline: reverse KL on its own samples."""
    model, tokenizer = load_model(target)
    record = distil_draft(
        model, tokenizer, read_rows(data, tokenizer), output, layers, steps, learning_rate=learning_rate, seed=seed
    )
    typer.echo(json.dumps({"parameters": record["parameters"], "divergence": record["history"][-1]}))


@app.command()
def medusa(
    target: Annotated[Path, typer.Option(help="Checkpoint that the heads are for; it stays as it is.")],
    data: Annotated[Path, typer.Option(help="Training rows that collect wrote.", **_INPUT)],
    output: Annotated[Path, typer.Option(help="The heads go here, as safetensors.", callback=output_file)],
    heads: Annotated[int, typer.Option(min=1)] = 4,
    steps: Annotated[int, typer.Option(min=1)] = 300,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    seed: Seed = 0,
) -> None:
    """Trains Medusa-style heads for the baseline."""
    model, tokenizer = load_model(target)
    rows = read_rows(data, tokenizer)
    losses = train_medusa(model, tokenizer, rows, output, heads, steps, learning_rate=learning_rate, seed=seed)
    typer.echo(json.dumps({"heads": heads, "loss": losses[-1]}))


@app.command()
def settings() -> None:
    """Prints all settings of train with their defaults and where these are from, as YAML."""
    typer.echo(describe(), nl=False)


def _chosen(stage: str, *stages: str) -> tuple[str, ...]:
    """The stages that ``stage`` names: one of them, or all."""
    names = ("all", *stages)
    if stage not in names:
        raise ValueError(f"the stage is {stage!r}, not one of {', '.join(names)}")
    return stages if stage == "all" else (stage,)


@app.command()
def spider(
    data: Annotated[Path, typer.Option(help="Folder with Spider's train.jsonl, dev.jsonl and tables.json.")],
    output: Annotated[
        Path, typer.Option(help="spider-target and spider-cllm go here.", callback=output_folder)
    ] = Path("models"),
    work: Annotated[
        Path, typer.Option(help="The target's answers and the held-out questions go here.", callback=output_folder)
    ] = Path("runs/spider"),
    stage: Annotated[str, typer.Option(help="target, cllm, baselines, evaluate, or all of them in turn.")] = "all",
    schema: Annotated[
        bool, typer.Option(help="The target gets the schema in its prompt; what follows from it does as it does.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Makes the bundled models: target from scratch, its answers, CLLM, draft and heads, evaluation."""
    stages = _chosen(stage, "target", "cllm", "baselines", "evaluate")
    if threads:
        torch.set_num_threads(threads)
    if "target" in stages:
        _spider.build_target(data, output / "spider-target", schema)
    if "cllm" in stages:
        _spider.build_cllm(data, output / "spider-target", output / "spider-cllm", work)
    if "baselines" in stages:
        _spider.build_baselines(data, output, work)
    if "evaluate" in stages:
        _spider.evaluate_models(data, output, work)


@app.command()
def gsm8k(
    data: Annotated[Path, typer.Option(help="Folder with GSM8K's train.jsonl.")],
    output: Annotated[
        Path, typer.Option(help="gsm8k-target and gsm8k-cllm go here.", callback=output_folder)
    ] = Path("models"),
    work: Annotated[
        Path, typer.Option(help="The target's answers go here.", callback=output_folder)
    ] = Path("runs/gsm8k"),
    stage: Annotated[str, typer.Option(help="target, cllm, or both in turn: all.")] = "all",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Makes a small target from scratch on GSM8K's texts, and its CLLM."""
    stages = _chosen(stage, "target", "cllm")
    if threads:
        torch.set_num_threads(threads)
    if "target" in stages:
        _gsm8k.build_target(data, output / "gsm8k-target")
    if "cllm" in stages:
        _gsm8k.build_cllm(data, output / "gsm8k-target", output / "gsm8k-cllm", work)


def main() -> None:
    """Entry point of the ``cllm-train`` command."""
    app()
