"""Commands of ``cllm``: demo, generate, verify, bench, doctor."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from .. import JacobiConfig, JacobiGenerator, __version__, backends
from .. import verify as _verify
from ..comparison import load_model
from . import bench as _bench
from . import demo as _demo
from .commands import DTYPES, Commands, apart, available_device, one_of, output_file, utf8

app = typer.Typer(
    cls=Commands, help="Jacobi decoding for Consistency LLMs.", no_args_is_help=True, add_completion=False
)
console = Console()

BlockSize = Annotated[int, typer.Option(min=2, help="Window width n.")]
Device = Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.", callback=available_device)]
Dtype = Annotated[
    str,
    typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.", callback=one_of("auto", *DTYPES)),
]


@app.command()
def demo(
    models: Annotated[Path, typer.Option(help="Folder with spider-target and spider-cllm.")] = Path("models"),
    prompts: Annotated[
        Path | None,
        typer.Option(help="Other questions: JSONL with db_id, question, query.", exists=True, dir_okay=False),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="How many questions; all if not given.")] = None,
    block_size: BlockSize = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each prompt; their median counts.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's default if not given.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the table.")] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the table's rows here.", callback=output_file)
    ] = None,
) -> None:
    """Answers text-to-SQL questions with the bundled models, AR beside Jacobi, and compares their speed."""
    apart(json_path, prompts)
    if threads:
        torch.set_num_threads(threads)
    rows = _demo.run(console, models, prompts, limit, block_size, rounds, quiet)
    if json_path:
        json_path.write_text(json.dumps(rows, indent=1) + "\n")


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Local checkpoint or hub name of a causal LM.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.", callback=utf8)],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    block_size: BlockSize = 16,
    mode: Annotated[str, typer.Option(help="window or block.")] = "window",
    draft: Annotated[str, typer.Option(help="context, last, lookup, auto or none.")] = "context",
    candidates: Annotated[int, typer.Option(min=1, help="Windows looked at in one forward.")] = 1,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of the window's width in flight.")] = 1,
    backend: Annotated[str, typer.Option(help="auto, or a name that `cllm doctor` lists.")] = "auto",
    dtype: Dtype = "auto",
    device: Device = "cpu",
) -> None:
    """Continues a prompt by greedy Jacobi decoding; text goes to stdout, statistics to stderr."""
    config = JacobiConfig(
        block_size=block_size, mode=mode, draft=draft, candidates=candidates, blocks=blocks, backend=backend
    )
    _check_backend(backend, device)
    loaded, tokenizer = load_model(model, dtype, device)
    generator = JacobiGenerator(loaded, config)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    generator.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        streamer=transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    run = generator.statistics
    chosen = f", windows chosen {' '.join(map(str, run.chosen))}" if run.chosen else ""
    Console(stderr=True).print(
        f"{run.tokens} tokens, {run.forwards} forwards, {run.tokens_per_forward:.2f} tokens per forward, "
        f"{run.tokens_per_second:.1f} tokens/s, backend {run.backend}, {run.attention} attention{chosen}"
    )


@app.command()
def verify(
    model: Annotated[str, typer.Option(help="Local checkpoint or hub name of a causal LM.")],
    prompt: Annotated[str, typer.Option(help="Text that was continued.", callback=utf8)],
    ids: Annotated[str | None, typer.Option(help="New token ids, by spaces or commas; else decoded here.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of the run; 128, or as many as ids.")] = None,
    block_size: BlockSize = 16,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampled tokens.")] = 0,
    backend: Annotated[str, typer.Option(help="auto, or a name that `cllm doctor` lists.")] = "auto",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the certificate here.", callback=output_file)
    ] = None,
) -> None:
    """Checks token by token that an output is what the model gives; exits with 1 where it is not, with 2 on bad input."""
    sampling = dict(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed) if temperature else {}
    options = {"do_sample": False, "block_size": block_size, "backend": backend} | sampling
    _check_backend(backend, device)
    new_ids = None if ids is None else _token_ids(ids)
    loaded, tokenizer = load_model(model, dtype, device)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    if new_ids is None:
        options["max_new_tokens"] = max_new_tokens or 128
        output = JacobiGenerator(loaded).generate(**inputs, **options)
    else:
        new = torch.tensor([new_ids], dtype=torch.int64, device=device)
        options["max_new_tokens"] = max_new_tokens or max(1, new.shape[1])
        output = torch.cat((inputs["input_ids"], new), dim=1)
    certificate = _verify(loaded, **inputs, output=output, **options)
    if json_path:
        rows = dataclasses.asdict(certificate)
        summary = dict(exact=certificate.exact, lossless=certificate.lossless, near_ties=certificate.near_ties)
        json_path.write_text(json.dumps(summary | rows, indent=1) + "\n")
    console.print(str(certificate), highlight=False, markup=False)
    if not certificate.lossless:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=CHECKPOINT, may be repeated; the bundled models if not given.")
    ] = None,
    workload: Annotated[
        str, typer.Option(
            help="spider, gsm8k or humaneval; the last two as text only.", callback=one_of("spider", "gsm8k", "humaneval")
        )
    ] = "spider",
    data: Annotated[Path, typer.Option(help="Folder with gsm8k and humaneval.")] = Path("../shared/data"),
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 16,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size, may be repeated; 1 if not given.")] = None,
    block_size: Annotated[list[int] | None, typer.Option(min=2, help="Window width, may be repeated; 16.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each prompt; their median counts.")] = 3,
    draft_model: Annotated[
        str | None, typer.Option("--draft", "--draft-model", help="Checkpoint for transformers' assisted generation.")
    ] = None,
    compiled: Annotated[bool, typer.Option(help="Measure transformers' compiled AR too.")] = True,
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Decode larger batches by so many rows at once, too.")
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16.", callback=one_of(*DTYPES))
    ] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's default if not given.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the rows here.", callback=output_file)
    ] = None,
) -> None:
    """Measures decoding end to end: Jacobi's modes and drafts beside AR, compiled AR, prompt lookup and assistants."""
    if threads:
        torch.set_num_threads(threads)
    named = [entry.split("=", 1) if "=" in entry else (Path(entry).name, entry) for entry in model or ()]
    chosen = dict(named) or {name: f"models/spider-{name}" for name in ("target", "cllm")}
    if len(chosen) < len(named):
        raise ValueError(f"two models of {', '.join(model)} have one name; name them NAME=CHECKPOINT")
    rows = _bench.run(
        chosen, workload, data, prompts, batch or [1], block_size or [16], max_new_tokens, rounds, draft_model,
        compiled, max_batch_size, device, dtype, console,
    )  # fmt: skip
    Console(width=max(console.width, 140)).print(_bench.table(rows))
    if json_path:
        json_path.write_text(json.dumps(rows, indent=1) + "\n")


@app.command()
def doctor() -> None:
    """Says which backends are there, and why the others are not."""
    table = Table(title=f"cllm_kernels {__version__}")
    table.add_column("what")
    table.add_column("state")
    for name, reason in backends.available().items():
        table.add_row(f"backend {name}", "available" if reason is None else f"not available: {reason}")
    table.add_row("auto on this CPU", backends.resolve("auto", torch.device("cpu")))
    for index in range(torch.cuda.device_count()):
        device, name = torch.device("cuda", index), torch.cuda.get_device_name(index)
        faster = sum(backend == "triton" for backend in backends.attention_table(device).values())
        measured = f", Triton for {faster} of {len(backends.attention_table(device))} measured sizes of attention"
        table.add_row(f"auto on cuda:{index}, {name}", backends.resolve("auto", device) + measured)
    if backends.EXTENSION is not None:
        table.add_row("CPU instruction set", backends.EXTENSION.cpu_isa())
        for key, value in backends.EXTENSION.build_info().items():
            table.add_row(f"build {key}", str(value))
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    table.add_row("transformers", transformers.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.machine()}")
    console.print(table)


def _check_backend(backend: str, device: str) -> None:
    try:
        backends.resolve(backend, torch.device(device))
    except RuntimeError as error:  # it is not there
        raise ValueError(str(error)) from None


def _token_ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    wrong = [word for word in words if not word.isdecimal() or int(word) >= 2**31]
    if wrong:
        raise ValueError(f"--ids holds {wrong[0]!r}; it must hold token ids, by spaces or commas")
    return list(map(int, words))


def main() -> None:
    """Entry point of the ``cllm`` command."""
    app()
