"""Builds cllm_kernels._C from csrc/ with ninja. Neither torch nor a GPU is needed.

Environment:
  CXX               the compiler, g++ if unset
  CLLM_REQUIRE_EXT  1: a build without the compiled module is an error, not a pure-Python package
  CLLM_CUDA         auto (default): CUDA kernels where nvcc can compile them; 0: never; 1: or fail
  CLLM_CUDA_ARCHS   compute capabilities to compile for, such as "80;90"; by default those of CUDA_ARCHS that nvcc knows
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
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
        # GCC 12 warns inside its own avx512fintrin.h.
        "-mprefer-vector-width=512", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
    ]  # fmt: skip
    ISA_FLAGS["avx512bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]


# Compute capabilities that code is made for, beside PTX of the last one for those to come. Code for 8.0 runs on 8.6 and
# 8.9 as well, for 10.0 on 10.3; nothing in the kernels is made for these.
CUDA_ARCHS = (80, 90, 100, 120)
OLDEST_CUDA = (12, 0)
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


@dataclasses.dataclass(frozen=True)
class Cuda:
    """What the CUDA kernels are built with."""

    version: str
    archs: tuple[int, ...]

    @property
    def flags(self) -> list[str]:
        ptx = f"-gencode=arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}"
        return [*CUDA_FLAGS, *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs), ptx]


def nvcc(*arguments: str) -> str:
    return subprocess.run(["nvcc", *arguments], check=True, capture_output=True, text=True).stdout


def find_cuda() -> tuple[Cuda | None, str]:
    """How to build for CUDA; or None and why it cannot be. Raises SystemExit where CLLM_CUDA_ARCHS makes no sense."""
    if shutil.which("nvcc") is None:
        return None, "there is no nvcc in PATH"
    try:
        release = re.search(r"release (\d+)\.(\d+)", nvcc("--version"))
        known = sorted(int(arch) for arch in re.findall(r"compute_(\d+)", nvcc("--list-gpu-arch")))
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"nvcc does not run: {error}"
    version = tuple(map(int, release.groups())) if release else (0, 0)
    if version < OLDEST_CUDA:
        return None, f"nvcc is of CUDA {version[0]}.{version[1]}; it must be {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} or newer"
    known = [arch for arch in known if arch >= CUDA_ARCHS[0]]
    given = os.environ.get("CLLM_CUDA_ARCHS", "")
    archs = re.split(r"[;, ]+", given) if given else [str(arch) for arch in CUDA_ARCHS if arch in known]
    if not all(arch in map(str, known) for arch in archs):
        raise SystemExit(f"CLLM_CUDA_ARCHS is {given!r}; this nvcc knows {';'.join(map(str, known))}")
    return Cuda(f"{version[0]}.{version[1]}", tuple(sorted(map(int, archs)))), ""


def cuda_build() -> Cuda | None:
    """How to build for CUDA, by CLLM_CUDA, or None.

    Errors are SystemExit, because setuptools takes others as a reason to leave out an optional extension.
    """
    choice = os.environ.get("CLLM_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"CLLM_CUDA is {choice!r}; allowed are auto, 0 and 1")
    if choice == "0":
        return None
    cuda, reason = find_cuda()
    if cuda is None and choice == "1":
        raise SystemExit(f"CLLM_CUDA=1, but {reason}")
    if cuda is None:
        print(f"cllm_kernels is built without CUDA kernels: {reason}", file=sys.stderr)
    return cuda


def write_if_changed(path: Path, text: str) -> None:
    """Leaves the time of an unchanged file alone, so that ninja builds nothing again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_headers(directory: Path, compiler: str, cuda: Cuda | None) -> None:
    """The headers that are generated: the fields of JacobiState, and how the module is built."""
    fields = runpy.run_path(str(ROOT / "cllm_kernels" / "ops" / "state_fields.py"))["FIELDS"]
    lines = (f"CLLM_STATE_FIELD({dtype}_t, {name}, {quote(dtype)}, {quote(shape)})" for name, dtype, shape, _ in fields)
    write_if_changed(directory / "jacobi_state.inc", "\n".join(lines) + "\n")
    flags = " ".join(FLAGS) + "".join(f"; {isa}: {' '.join(flags)}" for isa, flags in ISA_FLAGS.items() if flags)
    info = {"COMPILER": quote(compiler), "FLAGS": quote(flags)}
    if cuda is not None:
        info |= {
            "CUDA": "1",
            "CUDA_COMPILER": quote(f"nvcc {cuda.version}"),
            "CUDA_FLAGS": quote(" ".join(CUDA_FLAGS)),
            "CUDA_ARCHS": ", ".join(map(str, cuda.archs)),
            "CUDA_PTX": str(cuda.archs[-1]),
        }
    lines = (f"#define CLLM_{name} {value}\n" for name, value in info.items())
    write_if_changed(directory / "build_info.inc", "".join(lines))


def write_ninja(path: Path, target: Path, compiler: str, generated: Path, cuda: Cuda | None) -> None:
    import pybind11
    from ninja.ninja_syntax import Writer

    includes = [generated, pybind11.get_include(), sysconfig.get_path("include")]
    with path.open("w") as file:
        ninja = Writer(file)
        ninja.variable("cxx", compiler)
        ninja.variable("flags", [*FLAGS, *(f"-I{include}" for include in includes)])
        ninja.rule("cxx", "$cxx $flags $extra -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc",
                   description="CXX $out")  # fmt: skip
        # The runtime is linked in and its symbols are hidden: an import needs no CUDA, and torch brings its own.
        ninja.rule("link", "$cxx -shared -fopenmp -Wl,--as-needed $in -o $out" if cuda is None else
                   "nvcc -ccbin $cxx -shared -cudart static -Xcompiler -fopenmp "
                   "-Xlinker --as-needed,--exclude-libs,ALL $in -o $out", description="LINK $out")  # fmt: skip

        objects = []
        if cuda is not None:  # first, because these take longest
            ninja.variable("cuda_flags", ["-ccbin", "$cxx", *cuda.flags, f"-I{generated}"])
            ninja.rule("nvcc", "nvcc $cuda_flags -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc",
                       description="NVCC $out")  # fmt: skip
            for source in sorted(CSRC.glob("cuda/*.cu"), reverse=True):
                objects += ninja.build(f"cuda_{source.stem}.o", "nvcc", str(source))
        for source in sorted((*CSRC.glob("cpu/*.cpp"), *CSRC.glob("bindings/*.cpp"))):
            if source.name == "cuda_module.cpp" and cuda is None:
                continue
            if source.name == "kernels.cpp":
                for isa, flags in ISA_FLAGS.items():
                    extra = [*flags, f"-DCLLM_ISA={isa}"]
                    objects += ninja.build(f"kernels_{isa}.o", "cxx", str(source), variables={"extra": extra})
            else:
                objects += ninja.build(f"{source.parent.name}_{source.stem}.o", "cxx", str(source))
        ninja.build(str(target), "link", objects)


class BuildNinja(build_ext):
    def build_extension(self, extension: Extension) -> None:
        cuda = cuda_build()  # an error in CLLM_CUDA is never a reason to go on without the module
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        try:
            try:
                self.run_ninja(target, cuda)
            except subprocess.CalledProcessError as error:
                if cuda is None or os.environ.get("CLLM_CUDA", "auto") != "auto":
                    raise
                print(f"WARNING: the build with nvcc failed, trying without CUDA kernels: {error}", file=sys.stderr)
                self.run_ninja(target, None)
        except (CompileError, OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("CLLM_REQUIRE_EXT", "0") not in ("", "0"):
                raise SystemExit(f"cllm_kernels._C was not built (CLLM_REQUIRE_EXT is set): {error}") from error
            if os.environ.get("CLLM_CUDA") == "1":
                raise SystemExit(f"cllm_kernels._C was not built (CLLM_CUDA=1): {error}") from error
            print(
                f"WARNING: cllm_kernels._C WAS NOT BUILT, the package is pure Python and slower: {error}",
                file=sys.stderr,
            )
            # setuptools goes on without an extension that is marked optional.
            raise CompileError(str(error)) from error

    def run_ninja(self, target: Path, cuda: Cuda | None) -> None:
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler.split()[0]) is None:
            raise CompileError(f"no C++ compiler: {compiler} is not in PATH")
        build = Path(self.build_temp).resolve()
        generated = build / "generated"
        write_headers(generated, compiler, cuda)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_ninja(build / "build.ninja", target, compiler, generated, cuda)
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)], check=True)


if __name__ != "setup_functions":  # tests/ops/emulated_cuda.py uses the functions alone
    setup(
        ext_modules=[Extension("cllm_kernels._C", sources=[], optional=True)],
        cmdclass={"build_ext": BuildNinja},
    )
