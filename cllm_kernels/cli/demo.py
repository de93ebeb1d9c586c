"""The show and the table of ``cllm demo``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..comparison import compare_models, load_model
from ..decoding import JacobiConfig
from ..integrations.generate import JacobiGenerator
from ..spider import prompt_for, read_questions

SHOWN = 4


class _TokenPrinter(BaseStreamer):
    """Prints the tokens of AR decoding one by one."""

    def __init__(self, console: Console, tokenizer: PreTrainedTokenizerBase):
        self._console, self._tokenizer, self._prompt = console, tokenizer, True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        for token in value.tolist():
            _print_token(self._console, self._tokenizer, token, "dim")

    def end(self) -> None:
        self._console.print()


def _print_token(console: Console, tokenizer: PreTrainedTokenizerBase, token: int, style: str) -> None:
    text = tokenizer.decode([token], skip_special_tokens=True)
    console.print(text, style=style, end="", markup=False, highlight=False, soft_wrap=True)
    console.file.flush()


def run(
    console: Console,
    models: Path,
    prompts: Path | None,
    limit: int | None,
    block_size: int,
    rounds: int,
    quiet: bool,
) -> list[dict]:
    """Runs the demo and returns the table's rows."""
    paths = {name: models / f"spider-{name}" for name in ("target", "cllm")}
    for path in paths.values():
        if not path.is_dir():
            raise FileNotFoundError(f"no model at {path}; --models names the folder that holds spider-target and spider-cllm")
    questions = read_questions(prompts or paths["cllm"] / "held_out_sample.jsonl")[:limit]

    if not quiet:
        model, tokenizer = load_model(paths["cllm"])
        for row in questions[:SHOWN]:
            _show(console, model, tokenizer, row, block_size)

    def progress(items: list, name: str) -> Iterable:
        return track(items, f"measuring {name}", console=console, disable=quiet)

    rows = compare_models(paths, questions, block_size, rounds=rounds, progress=progress)
    console.print(_table(rows))
    return rows


def _show(
    console: Console, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: dict, block_size: int
) -> None:
    inputs = tokenizer(prompt_for(row), return_tensors="pt", return_token_type_ids=False)
    console.print(f"\n[bold]{escape(row['db_id'])}[/bold]: {escape(row['question'])}", highlight=False)
    console.print("AR       ", end="")
    reference = model.generate(
        **inputs, do_sample=False, max_new_tokens=256, streamer=_TokenPrinter(console, tokenizer)
    )

    def show_commit(tokens: list[int]) -> None:
        for index, token in enumerate(tokens):
            _print_token(console, tokenizer, token, "bold green" if index else "default")

    console.print("Jacobi   ", end="")
    generator = JacobiGenerator(model, JacobiConfig(block_size=block_size))
    output = generator.generate(**inputs, do_sample=False, max_new_tokens=256, on_commit=show_commit)
    run = generator.statistics
    same = "same tokens" if torch.equal(output, reference) else "[red]different tokens[/red]"
    console.print(
        f"\n         {run.tokens} tokens in {run.forwards} forwards, {same}; [bold green]green[/bold green]: fast-forwarded",
        style="dim",
        highlight=False,
    )


def _table(rows: list[dict]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{first['prompts']} questions, fp32, {first['threads']} threads, batch 1; "
        "speed-up over Hugging Face generate on the same model",
        box=box.SIMPLE,  # with these, narrow enough for 80 columns
        pad_edge=False,
        collapse_padding=True,
    )
    for heading in ("model", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in ("n", "tokens/\nforward", "tokens\n/s", "speed-\nup", "equal\nto AR", "exact\nmatch", "degene-\nrate"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"],
            row["method"],
            str(row["block_size"]),
            f"{row['tokens_per_forward']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['equal']:.1%}",
            f"{row['exact_match']:.1%}",
            f"{row['degenerate']:.1%}",
        )
    return table
