"""Draws what `cllm bench` measured.

    cllm bench --block-size 4 --block-size 16 --block-size 64 --json benchmarks/results/end_to_end_cpu.json
    python benchmarks/end_to_end.py benchmarks/results/end_to_end_cpu.json

Writes a PNG beside the JSON file: for each model and batch size the speed over transformers' eager generate against the
width of the window, and how many tokens a forward committed.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from plot import plt, save

from cllm_kernels.cli.commands import output_file


def main(source: Annotated[Path, typer.Argument(help="What `cllm bench --json` wrote.", exists=True)]) -> None:
    output = output_file(source.with_suffix(".png"))
    rows = json.loads(source.read_text())
    panels = sorted({(row["model"], row["batch"]) for row in rows})
    figure, axes = plt.subplots(2, len(panels), figsize=(4.6 * len(panels), 7.2), squeeze=False)
    for column, (model, batch) in enumerate(panels):
        here = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        speeds, accepts = axes[0][column], axes[1][column]
        for method in dict.fromkeys(row["method"] for row in here):
            points = sorted((row["block_size"], row["speedup"]) for row in here if row["method"] == method)
            if points[0][0] == 1:
                speeds.axhline(points[0][1], label=method, linestyle=":", color=f"C{len(speeds.lines)}")
            else:
                speeds.plot(*zip(*points), marker="o", label=method, color=f"C{len(speeds.lines)}")
        speeds.set(title=f"{model}, batch {batch}", xlabel="window width n", ylabel="tokens/s over hf_ar", ylim=(0, None))
        speeds.legend(fontsize=7)
        for row in here:
            if row["method"] in ("jacobi_window", "jacobi_block", "jacobi_lookup"):
                total = sum(row["accept_histogram"])
                shares = [count / total for count in row["accept_histogram"][1:]]
                label = f"{row['method']}, n {row['block_size']}"
                accepts.plot(range(1, len(shares) + 1), shares, marker=".", label=label)
        accepts.set(xlabel="tokens committed by a forward", ylabel="share of forwards")
        accepts.legend(fontsize=7)
    first = rows[0]
    title = f"{first['workload']}, {first['dtype']}, {first['device']}, {first['threads']} threads, medians"
    print(save(figure, output, title))


if __name__ == "__main__":
    typer.run(main)
