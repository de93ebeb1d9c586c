"""The build without a compiler, and rules on the sources."""

import os
import re
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
        ({"CLLM_CUDA": "1"}, "CLLM_CUDA=1, but "),
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
