"""Builds cllm_kernels._C from csrc/ with ninja. Neither torch nor a GPU is needed.

Environment:
  CXX               the compiler, g++ if unset
  CLLM_REQUIRE_EXT  1: a build without the compiled module is an error, not a pure-Python package
  CLLM_CUDA         auto (default): CUDA kernels where nvcc and csrc/cuda/*.cu exist; 0: never; 1: or fail
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# -ffp-contract=fast fuses multiply-adds; the two -fno- options keep NaN and rounding as they are.
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-ffp-contract=fast",
    "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra",
]  # fmt: skip
# csrc/cpu/kernels.cpp is compiled once for each; the choice falls at run time.
ISA_FLAGS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
        "-mprefer-vector-width=512", "-Wno-maybe-uninitialized",  # GCC 12 warns inside its own avx512fintrin.h
    ]  # fmt: skip
    ISA_FLAGS["avx512bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]


def cuda_sources() -> list[Path]:
    """The CUDA sources to build, by CLLM_CUDA.

    Errors are SystemExit, because setuptools takes others as a reason to leave out an optional extension.
    """
    choice = os.environ.get("CLLM_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"CLLM_CUDA is {choice!r}; allowed are auto, 0 and 1")
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    nvcc = shutil.which("nvcc")
    if choice == "1" and not sources:
        raise SystemExit("CLLM_CUDA=1, but this version has no CUDA sources in csrc/cuda")
    if choice == "1" and nvcc is None:
        raise SystemExit("CLLM_CUDA=1, but there is no nvcc in PATH")
    return sources if choice != "0" and nvcc else []


def write_if_changed(path: Path, text: str) -> None:
    """Leaves the time of an unchanged file alone, so that ninja builds nothing again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_headers(directory: Path, compiler: str) -> None:
    """The headers that are generated: the fields of JacobiState, and how the module is built."""
    fields = runpy.run_path(str(ROOT / "cllm_kernels" / "ops" / "state_fields.py"))["FIELDS"]
    lines = (f"CLLM_STATE_FIELD({dtype}_t, {name}, {quote(dtype)}, {quote(shape)})" for name, dtype, shape, _ in fields)
    write_if_changed(directory / "jacobi_state.inc", "\n".join(lines) + "\n")
    flags = " ".join(FLAGS) + "".join(f"; {isa}: {' '.join(flags)}" for isa, flags in ISA_FLAGS.items() if flags)
    write_if_changed(
        directory / "build_info.inc",
        f"#define CLLM_COMPILER {quote(compiler)}\n#define CLLM_FLAGS {quote(flags)}\n",
    )


def write_ninja(path: Path, target: Path, compiler: str, generated: Path) -> None:
    import pybind11
    from ninja.ninja_syntax import Writer

    includes = [generated, pybind11.get_include(), sysconfig.get_path("include")]
    with path.open("w") as file:
        ninja = Writer(file)
        ninja.variable("cxx", compiler)
        ninja.variable("flags", [*FLAGS, *(f"-I{include}" for include in includes)])
        ninja.rule("cxx", "$cxx $flags $extra -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc",
                   description="CXX $out")  # fmt: skip
        ninja.rule("nvcc", "nvcc -std=c++17 -O3 -Xcompiler -fPIC -MD -MF $out.d -c $in -o $out", depfile="$out.d",
                   deps="gcc", description="NVCC $out")  # fmt: skip
        ninja.rule("link", "$cxx -shared -fopenmp -Wl,--as-needed $in -o $out", description="LINK $out")

        objects = []
        for source in sorted((*CSRC.glob("cpu/*.cpp"), *CSRC.glob("bindings/*.cpp"))):
            if source.name == "kernels.cpp":
                for isa, flags in ISA_FLAGS.items():
                    extra = [*flags, f"-DCLLM_ISA={isa}"]
                    objects += ninja.build(f"kernels_{isa}.o", "cxx", str(source), variables={"extra": extra})
            else:
                objects += ninja.build(f"{source.parent.name}_{source.stem}.o", "cxx", str(source))
        for source in cuda_sources():
            objects += ninja.build(f"cuda_{source.stem}.o", "nvcc", str(source))
        ninja.build(str(target), "link", objects)


class BuildNinja(build_ext):
    def build_extension(self, extension: Extension) -> None:
        cuda_sources()  # an error in CLLM_CUDA is never a reason to go on without the module
        try:
            self.run_ninja(Path(self.get_ext_fullpath(extension.name)).resolve())
        except (CompileError, OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("CLLM_REQUIRE_EXT", "0") not in ("", "0"):
                raise SystemExit(f"cllm_kernels._C was not built (CLLM_REQUIRE_EXT is set): {error}") from error
            print(
                f"WARNING: cllm_kernels._C WAS NOT BUILT, the package is pure Python and slower: {error}",
                file=sys.stderr,
            )
            # setuptools goes on without an extension that is marked optional.
            raise CompileError(str(error)) from error

    def run_ninja(self, target: Path) -> None:
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler.split()[0]) is None:
            raise CompileError(f"no C++ compiler: {compiler} is not in PATH")
        build = Path(self.build_temp).resolve()
        generated = build / "generated"
        write_headers(generated, compiler)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_ninja(build / "build.ninja", target, compiler, generated)
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)], check=True)


setup(
    ext_modules=[Extension("cllm_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNinja},
)
