"""Small consistency trainings of the bundled target that differ in one setting each, as rows of one JSON file.

    python benchmarks/ablations.py --data ../shared/data/spider [--only base --only n8]

Every variant is three commands of ``cllm-train``, which its row names: trajectories of the first ``--questions``
training questions, training, evaluation on the first ``--prompts`` held-out questions. Rows go to
``benchmarks/results/ablations.json`` as they are made; variants that are there already are left out. Files of the
runs are under ``runs/ablations``. Such trainings are far from converged: they rank settings and make no good model.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from cllm_trainer.spider import load

TARGET = Path("models/spider-target")
WORK = Path("runs/ablations")
# name: block size, share of the questions, settings that differ
VARIANTS = {
    "base": (16, 1.0, ""),
    "n8": (8, 1.0, ""),
    "n32": (32, 1.0, ""),
    "n64": (64, 1.0, ""),
    "half the data": (16, 0.5, "--epochs 16"),
    "AR weight 10": (16, 1.0, "--ar-weight 10"),
    "local consistency": (16, 1.0, "--consistency local --alarm-ar 100"),
    "reverse KL": (16, 1.0, "--divergence reverse --alarm-ar 100"),
    "JSD": (16, 1.0, "--divergence jsd"),
    "random schedule": (16, 1.0, "--schedule random"),
    "progressive schedule": (16, 1.0, "--schedule progressive"),
    "on policy": (16, 1.0, "--on-policy"),
}
COMMON = "--epochs 8 --batch-size 8 --learning-rate 3e-4 --weight-decay 0.1 --warmup-steps 50 --noisy-blocks 8 --bf16"
MEASURES = ("tokens_per_forward", "speedup", "equal", "degenerate", "fast_forwarded", "stationary")


def commands(name: str, questions: int, prompts: int) -> list[str]:
    """The three commands of a variant."""
    block_size, share, settings = VARIANTS[name]
    count = round(share * questions)
    rows, model = WORK / f"n{block_size}_{count}.jsonl", WORK / name.replace(" ", "_")
    return [
        f"cllm-train collect --model {TARGET} --prompts {WORK}/questions_{count}.jsonl --output {rows} "
        f"--block-size {block_size}",
        f"cllm-train train --model {TARGET} --data {rows} --output {model} {COMMON} {settings}".rstrip(),
        f"cllm-train evaluate --target {TARGET} --cllm {model} --questions {WORK}/held_out.jsonl --limit {prompts} "
        f"--block-size {block_size} --output {model}.json",
    ]


def run(name: str, questions: int, prompts: int) -> dict:
    """Runs the commands of a variant; its row."""
    row = {"variant": name, "commands": commands(name, questions, prompts)}
    for command in row["commands"]:
        words = shlex.split(command)
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cllm_trainer", *words[1:]], check=True, stdout=subprocess.DEVNULL)
        row[f"{words[1]}_seconds"] = round(time.perf_counter() - begin, 1)
    found = json.loads((WORK / f"{name.replace(' ', '_')}.json").read_text())
    for model in ("target", "cllm"):
        own = next(one for one in found if (one["model"], one["method"]) == (model, "jacobi_window"))
        row |= {f"{model}_{measure}": own[measure] for measure in MEASURES}
        row[f"{model}_exact_match"] = own["measures"]["exact_match"]["mean"]
    return row | {key: found[0][key] for key in ("prompts", "threads", "torch", "transformers")}


def main(
    data: Annotated[Path, typer.Option(help="Folder with Spider's train.jsonl and tables.json.")],
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(VARIANTS)}; all without.")] = None,
    questions: Annotated[int, typer.Option(min=2)] = 1000,
    prompts: Annotated[int, typer.Option(min=1)] = 100,
    output: Path = Path("benchmarks/results/ablations.json"),
) -> None:
    unknown = set(only or ()) - set(VARIANTS)
    if unknown:
        raise typer.BadParameter(f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    training, held_out, _ = load(data)
    WORK.mkdir(parents=True, exist_ok=True)
    files = {"held_out": held_out}
    for _, share, _ in VARIANTS.values():
        files[f"questions_{round(share * questions)}"] = training[: round(share * questions)]
    for name, rows in files.items():
        (WORK / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = json.loads(output.read_text()) if output.exists() else []
    for name in only or VARIANTS:
        if name not in [row["variant"] for row in done]:
            done.append(run(name, questions, prompts))
            output.write_text(json.dumps(done, indent=1) + "\n")
            print(f"{name}: {done[-1]['cllm_tokens_per_forward']:.2f} tokens per forward, "
                  f"exact match {done[-1]['cllm_exact_match']:.1%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
