"""What Triton's kernels take when they are compiled, and what the ops have to do at least. Needs no GPU.

    python benchmarks/compiled_kernels.py [FILE]

Compiles every kernel and configuration that the tests compile (tests/ops/compile_triton.py), writes FILE (default:
benchmarks/results/triton_compiled.json) and prints Markdown. Floors are times by the data sheet of an H200, not
measurements: bytes by its bandwidth or FLOPs by its rate, whichever takes longer. Bytes count every tensor once; what
is read again by another tile is taken to come from the L2 cache. What a first launch writes and a second reads (the
partial results of splits) counts as bytes too, but not in the floor, because the L2 cache may hold it: the time with
them stands beside it.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "ops"))

import compile_triton

from cllm_kernels.triton import configs

# NVIDIA H200 SXM data sheet: memory bandwidth, and dense bf16 on tensor cores.
BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.8e12, 989e12
WIDTHS = (1, 8, 16, 32, 64, 128)
LENGTHS = (256, 1024, 4096, 16384, 32768, 131072)
# (Hq, Hkv, D), and (V, H) of the LM head.
SHAPES = {"Llama-3-8B": (32, 8, 128), "Qwen2.5-7B": (28, 4, 128), "Llama-2-7B": (32, 32, 128)}
HEADS = {"Llama-3-8B": (128_256, 4096), "Qwen2.5-7B": (152_064, 3584), "Llama-2-7B": (32_000, 4096)}
BF16, FP32, INT64 = 2, 4, 8


def row(op, read, written, between, flops, **facts):
    """between: bytes that a first launch writes and a second reads, which are not in `read` and `written`."""
    floor, with_between = (
        max(nbytes / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND)
        for nbytes in (read + written, read + written + 2 * between)
    )
    return {
        "op": op, **facts, "bytes_read": read + between, "bytes_written": written + between,
        "of_these_between_launches": between, "flops": flops, "h200_floor_s": floor,
        "h200_with_these_s": with_between, "measured_s": "not measured",
    }  # fmt: skip


def attention(model, width, length):
    """One row of the batch in bf16, with a cache that is just long enough."""
    heads, kv_heads, dim = SHAPES[model]
    rows, keys = width * heads // kv_heads, length + width
    config = configs.attention_config(dim, dim, torch.bfloat16, rows)
    splits, between, filled = configs.splits(keys, width, config.block_rows), 0, 1
    if splits > 1:
        size = max(configs.split_keys(config.block_rows), -(-keys // splits))
        size = -(-size // config.block_keys) * config.block_keys
        filled = -(-keys // size)
        # every split writes its sums; empty ones no values
        between = kv_heads * rows * (filled * dim + splits) * FP32
    query = width * heads * dim * BF16
    return row(
        "block_attention", query + 2 * keys * kv_heads * dim * BF16, query + heads * width * FP32, between,
        4 * heads * width * keys * dim, model=model, n=width, L=length, splits=splits, filled_splits=filled,
        row_tiles=-(-rows // config.block_rows),
    )  # fmt: skip


def append(model, width, rope):
    _, kv_heads, dim = SHAPES[model]
    values = 2 * width * kv_heads * dim * BF16
    angles, flops = (2 * width * dim * BF16, 3 * width * kv_heads * dim) if rope else (0, 0)
    return row("append_kv_", values + angles, values, 0, flops, model=model, n=width, rope=rope)


def converge(vocabulary, width):
    """The logits and what passes between the launches; the state takes less than 100 bytes a token."""
    splits = -(-vocabulary // configs.ARGMAX_SPLIT)
    between = width * splits * INT64
    return row("converge_", width * vocabulary * BF16, 0, between, 0, V=vocabulary, n=width, splits=splits)


def lm_head(model, width):
    vocabulary, size = HEADS[model]
    tiles = -(-vocabulary // configs.lm_head_config(torch.bfloat16, width).block_vocabulary)
    return row(
        "lm_head_argmax", (vocabulary + width) * size * BF16, width * (INT64 + FP32), width * tiles * INT64,
        2 * width * vocabulary * size, model=model, n=width, tiles=tiles,
    )  # fmt: skip


def table(title, head, rows):
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for cells in rows:
        print(f"| {' | '.join(map(str, cells))} |")


def microseconds(found):
    return f"{1e6 * found['h200_floor_s']:.2f} ({1e6 * found['h200_with_these_s']:.2f})"


def main(target):
    kernels = sorted(compile_triton.compile_all(), key=lambda found: (found["name"], found["arch"]))
    work = [attention(model, width, length) for model in SHAPES for width in WIDTHS for length in LENGTHS]
    work += [append(model, width, rope) for model in SHAPES for width in WIDTHS for rope in (False, True)]
    work += [converge(vocabulary, width) for vocabulary, _ in sorted(HEADS.values()) for width in WIDTHS]
    work += [lm_head(model, width) for model in HEADS for width in WIDTHS]
    sheet = {"name": "NVIDIA H200 SXM", "bytes_per_s": BYTES_PER_SECOND, "bf16_flops_per_s": FLOPS_PER_SECOND}
    target.parent.mkdir(parents=True, exist_ok=True)
    results = {"triton": compile_triton.triton.__version__, "data_sheet": sheet, "kernels": kernels, "work": work}
    target.write_text(json.dumps(results, indent=1) + "\n")

    head = ("kernel", "arch", "registers per thread", "bytes spilled", "shared memory, bytes", "warps")
    keys = ("registers", "spilled", "shared", "warps")
    cells = [(found["name"], f"sm_{found['arch']}", *(found[key] for key in keys)) for found in kernels]
    table(f"Compiled by Triton {results['triton']}", head, cells)
    note = "floor by the data sheet of an H200 (and with what passes between launches), in µs (measured: not measured)"
    for model in SHAPES:
        rows = [(width, *(microseconds(attention(model, width, length)) for length in LENGTHS)) for width in WIDTHS]
        table(f"`block_attention`, {model}, bf16, batch 1, {note}", ("n", *(f"L {length}" for length in LENGTHS)), rows)
    others = [found for found in work if found["op"] != "block_attention"]
    facts = ("op", "model", "V", "rope", "n", "bytes_read", "bytes_written", "flops")
    rows = [(*(found.get(key, "") for key in facts), microseconds(found)) for found in others]
    table(f"The other ops, bf16, batch 1, {note}", (*facts, "floor"), rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / "triton_compiled.json")
