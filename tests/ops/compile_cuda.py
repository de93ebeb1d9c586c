"""Compiles the CUDA sources for every architecture of the build, and prints what each kernel takes as JSON lines.

    python tests/ops/compile_cuda.py [--table]
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
THREADS = {"append_kernel": 256, "converge_kernel": 256, "merge_kernel": 128}
# What the last block of converge_ takes for a window of 16 (csrc/cuda/converge.cuh).
CONVERGE_SHARED = 8 * 8 + 16 + 8 * 16 * 24
LINE = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_\d+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def describe(symbol: str) -> tuple[str, int, int]:
    """Name, threads of a block and its shared memory, from a kernel's mangled name."""
    kernel = re.search(r"cuda\d+(\w+?_kernel)I", symbol)[1]
    dtypes = re.findall(r"bf16|f16|(?<=I)f(?=[EfLN])", symbol)
    tile = re.search(r"TileILi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E", symbol)
    if tile is None:
        options = "".join(re.findall(r"kernelI(\w+?)EEv", symbol))
        shared = CONVERGE_SHARED if kernel == "converge_kernel" else 0
        return f"{kernel} {options}", THREADS[kernel], shared
    dim, row_warps, key_warps, keys, stages = map(int, tile.groups())
    shared = (16 * row_warps + 2 * stages * keys) * (dim + 8) * 2
    name = f"{kernel} {dtypes[0]} D={dim} rows={16 * row_warps} keys={keys} stages={stages}"
    return name, 32 * row_warps * key_warps, shared


def compile_source(job: tuple[Path, int, Path]) -> list[dict]:
    source, arch, directory = job
    command = [
        "nvcc", "-std=c++17", "-O3", f"-I{directory}", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin",
        "-o", directory / f"{source.stem}_{arch}.cubin", source,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name} for sm_{arch}: {done.stderr[-3000:]}")
    rows = []
    for symbol, *numbers in LINE.findall(done.stderr):
        stack, stores, loads, registers = map(int, numbers)
        name, threads, shared = describe(symbol)
        rows.append(
            {"file": source.name, "arch": arch, "name": name, "threads": threads, "shared": shared,
             "registers": registers, "stack": stack, "spilled": stores + loads}
        )  # fmt: skip
    return rows


def run() -> list[dict]:
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_functions")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        setup["write_headers"](directory, "g++", None)
        sources = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if path.stem != "stream"]
        known = {int(arch) for arch in re.findall(r"compute_(\d+)", setup["nvcc"]("--list-gpu-arch"))}
        jobs = [(source, arch, directory) for source in sources for arch in setup["CUDA_ARCHS"] if arch in known]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [row for rows in pool.map(compile_source, jobs) for row in rows]


def table(rows: list[dict]) -> str:
    archs = sorted({row["arch"] for row in rows})
    names = sorted({(row["name"], row["threads"], row["shared"]) for row in rows})
    registers = {(row["name"], row["arch"]): row["registers"] for row in rows}
    lines = [f"{'kernel':62} threads  shared  registers on " + ", ".join(f"sm_{arch}" for arch in archs)]
    for name, threads, shared in names:
        lines.append(f"{name:62} {threads:7} {shared:7}  " + " ".join(f"{registers[name, arch]:4}" for arch in archs))
    return "\n".join(lines)


if __name__ == "__main__":
    found = run()
    print(table(found) if "--table" in sys.argv else "\n".join(map(json.dumps, found)))
