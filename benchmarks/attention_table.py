"""Writes which of a GPU's two kernels of block_attention is the faster one, for each size, from what test_kernels.py measured.

    python benchmarks/attention_table.py kernels.json cllm_kernels/attention_table.json

There `backend="auto"` finds it (cllm_kernels/backends.py); entries of other GPUs stay. Triton is taken where it was
faster by more than 2 % in the geometric mean over the cases of an entry.
"""

import collections
import json
import math
import sys
from pathlib import Path

from cllm_kernels.backends import attention_cell


def entries(results: dict) -> dict[str, dict[str, str]]:
    """GPU's name to cell to backend, from pytest-benchmark's JSON."""
    ratios = collections.defaultdict(list)
    for case in results["benchmarks"]:
        facts, parameters = case["extra_info"], case["params"] or {}
        triton = facts.get("alternatives_s", {}).get("triton")
        if not case["name"].startswith("test_block_attention[") or triton is None:
            continue
        heads, kv_heads, dim = map(int, parameters["shape"].split("x"))
        width = parameters["width"]
        cell = attention_cell(dim, width * heads // kv_heads, parameters["length"] + width)
        ratios[facts["device"], cell].append(math.log(facts["ours_s"] / triton))
    table = collections.defaultdict(dict)
    for (gpu, cell), logs in sorted(ratios.items()):
        table[gpu][cell] = "triton" if sum(logs) / len(logs) > math.log(1.02) else "cuda"
    return dict(table)


def main(source: Path, target: Path) -> None:
    table = json.loads(target.read_text()) if target.exists() else {}
    found = entries(json.loads(source.read_text()))
    target.write_text(json.dumps(table | found, indent=1) + "\n")
    for gpu, cells in found.items():
        slower = [cell for cell, name in cells.items() if name == "triton"]
        print(f"{gpu}: CUDA is at least as fast in {len(cells) - len(slower)} of {len(cells)} sizes; Triton in", slower or "none")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
