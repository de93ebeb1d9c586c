"""Builds the CUDA sources for the host, under the emulation of cuda_emulation/, as a Python module.

    python tests/ops/emulated_cuda.py [--sanitize]     builds it and prints its path
"""

from __future__ import annotations

import fcntl
import importlib.util
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).with_name("cuda_emulation")
FLAGS = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fvisibility=hidden"]
# Of the host's CPU the newest is fine: what is built here never leaves this machine.
OPTIMIZE = ["-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def reason() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if not (ROOT / "csrc" / "cuda").is_dir():
        return "the sources are not here"
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return f"the fibers of the emulation are written for x86-64 Linux, this is {platform.machine()} {sys.platform}"
    return None if shutil.which("g++") else "there is no g++ in PATH"


def build(sanitize: bool = False) -> Path:
    """The module's file, built again where a source is newer."""
    import pybind11
    from ninja.ninja_syntax import Writer

    directory = ROOT / "build" / ("cuda_emulation_sanitized" if sanitize else "cuda_emulation")
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / "emulated_cuda.so"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_functions")
        setup["write_headers"](directory, "g++", None)
        includes = [ROOT / "csrc", EMULATION, directory, pybind11.get_include(), sysconfig.get_path("include")]
        with (directory / "build.ninja").open("w") as file:
            ninja = Writer(file)
            ninja.variable("flags", [*FLAGS, *(SANITIZE if sanitize else OPTIMIZE), *(f"-I{path}" for path in includes)])
            ninja.rule("cxx", "g++ $flags -MMD -MF $out.d -x c++ -c $in -o $out", depfile="$out.d", deps="gcc")
            ninja.rule("link", "g++ $flags -shared $in -o $out")
            sources = [path for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if path.stem != "stream"]
            sources += [ROOT / "csrc" / "bindings" / "cuda_module.cpp", EMULATION / "emulation.cpp"]
            objects = [ninja.build(f"{path.stem}.o", "cxx", str(path))[0] for path in sources]
            ninja.build(target.name, "link", objects)
        command = [sys.executable, "-m", "ninja", "-C", str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the CUDA sources do not compile for the host:\n{done.stdout[-5000:]}")
    return target


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulated_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build("--sanitize" in sys.argv))
