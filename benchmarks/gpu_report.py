"""Joins what the stages of scripts/gpu_check.sh measured into one JSON, and says in Markdown what it means.

    python benchmarks/gpu_report.py PARTS GPU.json GPU.md [FAILED STAGE ...]

PARTS holds steps_*.json (benchmarks/steps.py), decode.json (cllm bench) and kernels_*.json (pytest-benchmark), as far
as they are there.
"""

import json
import sys
from pathlib import Path

# What a 7B model's tokens per forward are taken to be: the speed-ups over AR in the abstract of CLLM (Kou et al., 2024,
# arXiv:2403.00835), which its tokens per forward cannot be below.
PAPER = (2.4, 3.4)
# On an H200, of a step of 16 tokens behind 1024 of a 7B model.
TARGETS = (("over_weights", "at most", 1.15, "of reading the weights once"), ("over_ours_1", "at most", 1.10, "of our AR step"),
           ("over_hf_eager", "at least", 5.0, "the speed of transformers' eager AR step"))  # fmt: skip


def load(path: Path):
    """What a stage wrote, or None where it was stopped while it did."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        print(f"{path} is cut off", file=sys.stderr)
        return None


def read(parts: Path) -> dict:
    """What is there, by kind."""
    steps = [row for path in sorted(parts.glob("steps_*.json")) for row in load(path) or ()]
    found = {"steps": steps}
    for name, pattern in (("decode", "decode.json"), ("kernels", "kernels_*.json")):
        for path in parts.glob(pattern):
            if part := load(path):
                found[name] = part
    return found


def table(head, rows):
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def show(value, form):
    return "" if value is None else format(value, form)


def steps(rows):
    head = ("shape", "method", "n", "L", "ms a step", "quartiles", "floor, ms", "over the weights alone", "over ours n = 1",
            "speed over HF eager", "host gap")  # fmt: skip
    cells = [
        (row["shape"], row["method"], row["block_size"], row["cache_length"], f"{row['ms']:.2f}",
         "-".join(f"{value:.2f}" for value in row["ms_quartiles"]), f"{row['floor_ms']:.2f}", f"{row['over_weights']:.2f}x",
         show(row["over_ours_1"], ".2f"), f"{row['over_hf_eager']:.2f}x", show(row["host_gap"], ".0%"))
        for row in rows
    ]  # fmt: skip
    note = ("Random weights. Floor: weights and cache read once at the bandwidth of a copy or a sum, or the arithmetic at the rate of a "
            "matrix product. Host gap: share of the step in which the device idles.")  # fmt: skip
    return ["## A step", "", note, "", *table(head, cells)]


def targets(rows):
    lines = []
    for row in rows:
        if row["method"] not in ("ours_graph", "ours_compiled_graph") or (row["block_size"], row["cache_length"]) != (16, 1024):
            continue
        name = (row["shape"], "compiled" if "compiled" in row["method"] else "")
        for key, bound, limit, text in TARGETS:
            value = row[key]
            if value is not None:
                reached = value <= limit if bound == "at most" else value >= limit
                lines.append((*name, f"{bound} {limit}x {text}", f"{value:.2f}x", "reached" if reached else "missed"))
        low, high = (1e3 * tokens / row["ms"] for tokens in PAPER)
        lines.append((*name, "projection, above 800 tokens/s", f"{low:.0f} to {high:.0f} tokens/s",
                      "reached" if low > 800 else "in part" if high > 800 else "missed"))  # fmt: skip
    note = (f"The projection is not a measurement: {PAPER[0]} to {PAPER[1]} tokens a forward (the speed-ups of the CLLM paper's "
            "abstract) over the measured step.")  # fmt: skip
    return ["## Windows of 16 behind 1024 tokens", "", note, "", *table(("shape", "forward", "target", "measured", ""), lines)]


def decode(rows):
    cells = [
        (row["method"], row["batch"], row["block_size"], f"{row['tokens_per_second']:.0f}",
         show(row["tokens_per_forward"], ".2f"), f"{row['speedup']:.2f}x", f"{row['equal_to_hf_ar']:.0%}", row["backend"])
        for row in rows
    ]  # fmt: skip
    head = ("method", "batch", "n", "tokens/s", "tokens per forward", "speed over hf_ar", "equal", "backend")
    return [f"## The bundled CLLM, {rows[0]['dtype']}, {rows[0]['prompts']} prompts", "", *table(head, cells)]


def kernels(results):
    cells = []
    for case in results["benchmarks"]:
        facts = case["extra_info"]
        if "alternatives_s" in facts:
            triton = facts["alternatives_s"].get("triton")
            best = min(seconds for name, seconds in facts["alternatives_s"].items() if name != "triton")
            cells.append((case["name"], f"{1e6 * facts['ours_s']:.1f}", show(triton and triton / facts["ours_s"], ".2f"),
                          f"{best / facts['ours_s']:.2f}", f"{facts['of_floor']:.0%}"))  # fmt: skip
    return ["## Kernels", "", *table(("case", "µs", "over Triton", "over the fastest of torch", "of the floor"), cells)]


def main(parts: Path, target: Path, readable: Path, *failed: str) -> None:
    found = read(parts)
    target.write_text(json.dumps({"gpu": target.stem, "failed": failed} | found) + "\n")
    lines = [f"# {target.stem}", "", "failed or stopped: " + (", ".join(failed) or "none"), ""]
    if found["steps"]:
        lines += targets(found["steps"]) + steps(found["steps"])
    for name, make in (("decode", decode), ("kernels", kernels)):
        if name in found:
            lines += make(found[name])
    readable.write_text("\n".join(lines))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *sys.argv[4:])
