"""The build without a compiler, and rules on the sources."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

if not (ROOT / "setup.py").exists():
    pytest.skip("the sources are not here", allow_module_level=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what a build needs, without what earlier builds left."""
    copy = tmp_path_factory.mktemp("sources")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "cllm_kernels", "python"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


def wheel(sources, target, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "-v", ".", "--no-deps", "--no-build-isolation", "-w", str(target)]
    return subprocess.run(
        command, cwd=sources, env=os.environ | {"CLLM_REQUIRE_EXT": "0"} | environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_without_a_compiler_the_package_is_pure_python(sources, tmp_path):
    done = wheel(sources, tmp_path, CXX="/nonexistent/g++")
    assert done.returncode == 0, done.stdout + done.stderr
    line = r"WARNING: cllm_kernels._C WAS NOT BUILT, the package is pure Python and slower: no C\+\+ compiler"
    assert len(re.findall(line, done.stdout + done.stderr)) == 1
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    assert not list((tmp_path / "site").rglob("*.so"))
    assert (tmp_path / "site" / "cllm_trainer").is_dir()
    code = (
        # An editable install of this tree would still find the module that it built.
        "import sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)]\n"
        "import torch\n"
        "from cllm_kernels import backends\n"
        "from cllm_kernels.ops import append_kv_\n"
        "zeros, ones = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 1, 4)\n"
        "append_kv_(zeros, zeros.clone(), ones, ones, torch.ones(1, dtype=torch.int32))\n"
        "assert zeros.sum() == 4 and backends.resolve('auto', torch.device('cpu')) == 'torch'\n"
        "print(backends.__file__, backends.available()['cpp'])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "CLLM_BACKEND": ""}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path) in ran.stdout and "cllm_kernels._C is not built" in ran.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "/nonexistent/g++", "CLLM_REQUIRE_EXT": "1"}, r"not built \(CLLM_REQUIRE_EXT is set\): no C\+\+"),
        ({"CLLM_CUDA": "1", "PATH": "/nonexistent"}, "CLLM_CUDA=1, but there is no nvcc in PATH"),
        ({"CLLM_CUDA": "yes"}, "CLLM_CUDA is 'yes'; allowed are auto, 0 and 1"),
    ],
    ids=["require", "cuda", "cuda-name"],
)
def test_what_is_asked_for_must_be_built(sources, environment, message):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "out", "--build-temp", "out"],
        cwd=sources, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search(message, done.stderr)


NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;
  *) echo "nvcc fatal: this one compiles nothing" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def old_nvcc(tmp_path):
    """A PATH in which nvcc is a script that says of which release it is."""

    def make(release):
        script = tmp_path / "bin" / "nvcc"
        script.parent.mkdir(exist_ok=True)
        script.write_text(NVCC.format(release=release))
        script.chmod(0o755)
        return {"PATH": f"{script.parent}:{os.environ['PATH']}"}

    return make


def find_cuda(monkeypatch, **environment):
    for name in ("CLLM_CUDA", "CLLM_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup_functions")["cuda_build"]()


def test_architectures_are_cut_to_what_nvcc_knows(old_nvcc, monkeypatch, capfd):
    cuda = find_cuda(monkeypatch, **old_nvcc("12.4"))
    assert cuda.version == "12.4" and cuda.archs == (80, 90)
    assert cuda.flags[-1] == "-gencode=arch=compute_90,code=compute_90"
    assert find_cuda(monkeypatch, CLLM_CUDA_ARCHS="90").archs == (90,)
    assert find_cuda(monkeypatch, CLLM_CUDA_ARCHS="90;80").archs == (80, 90)
    for wrong in ("75", "95", "90a", "native", ";"):
        with pytest.raises(SystemExit, match=f"CLLM_CUDA_ARCHS is '{wrong}'; this nvcc knows 80;90"):
            find_cuda(monkeypatch, CLLM_CUDA_ARCHS=wrong)
    assert find_cuda(monkeypatch, CLLM_CUDA="0") is None and capfd.readouterr().err == ""


def test_an_nvcc_that_is_too_old(old_nvcc, monkeypatch, capfd):
    assert find_cuda(monkeypatch, **old_nvcc("11.4")) is None
    assert capfd.readouterr().err == (
        "cllm_kernels is built without CUDA kernels: nvcc is of CUDA 11.4; it must be 12.0 or newer\n"
    )
    with pytest.raises(SystemExit, match="CLLM_CUDA=1, but nvcc is of CUDA 11.4"):
        find_cuda(monkeypatch, CLLM_CUDA="1")


def test_an_nvcc_that_compiles_nothing(sources, old_nvcc, tmp_path):
    """Then the module has no CUDA kernels, and says so; unless they were asked for."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    environment = os.environ | old_nvcc("12.4") | {"CLLM_CUDA": "1", "CLLM_REQUIRE_EXT": "0"}
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "cllm_kernels._C was not built (CLLM_CUDA=1)" in done.stderr
    # The C++ compiler does not work either, to be done with it sooner.
    environment |= {"CLLM_CUDA": "auto", "CXX": "false"}
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)
    assert "WARNING: the build with nvcc failed, trying without CUDA kernels" in done.stderr
    assert "WARNING: cllm_kernels._C WAS NOT BUILT" in done.stderr


def test_kernels_know_neither_torch_nor_python():
    includes = {
        path.relative_to(ROOT / "csrc").as_posix(): set(re.findall(r'#include\s*[<"]([^>"]+)', path.read_text()))
        for path in (ROOT / "csrc").rglob("*.*")
    }
    for path, names in includes.items():
        assert not any(name.startswith(("torch/", "ATen/", "c10/")) for name in names), path
        if not path.startswith("bindings/"):
            assert not any(name.startswith(("pybind11/", "Python")) for name in names), path


def test_instruction_sets_share_no_code():
    """A function that the linker may merge would carry AVX-512 instructions into the baseline."""
    objects = list(ROOT.glob("build/**/kernels_*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of a build in this tree, or no nm")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line)]
        assert not weak, (path, weak)
