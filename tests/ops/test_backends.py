import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cllm_kernels import backends
from cllm_kernels.ops import append_kv_

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def run(code, **environment):
    command, environment = [sys.executable, "-c", code], os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def test_auto(monkeypatch):
    monkeypatch.delenv("CLLM_BACKEND", raising=False)
    assert backends.resolve("auto", CPU) == ("torch" if backends.EXTENSION is None else "cpp")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert backends.resolve("auto", CUDA) == "triton"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backends.resolve("auto", CUDA) == "torch"
    monkeypatch.setenv("CLLM_BACKEND", "torch")
    assert backends.resolve("auto", CPU) == "torch"
    monkeypatch.setenv("CLLM_BACKEND", "fastest")
    with pytest.raises(ValueError, match="backend is 'fastest'; allowed are 'auto', 'cpp', 'triton', 'torch', 'cuda'"):
        backends.resolve("auto", CPU)


def test_a_backend_that_is_not_built():
    assert backends.available()["cuda"] == "not in this build"
    with pytest.raises(RuntimeError, match="'cuda' was asked for but it is not in this build"):
        backends.resolve("cuda", CPU)


def test_triton_says_why_not(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.available()["triton"] is None and backends.resolve("triton", CPU) == "triton"
    with pytest.raises(RuntimeError, match="tensors are on cuda:0; it runs on the CPU, in its interpreter"):
        backends.resolve("triton", CUDA)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="'triton' was asked for but this torch is built without CUDA"):
        backends.resolve("triton", CPU)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert backends.resolve("triton", CUDA) == "triton"
    with pytest.raises(RuntimeError, match="tensors are on cpu; it runs on CUDA devices"):
        backends.resolve("triton", CPU)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.available()["triton"] == "triton is not installed"


def test_cpp_says_why_not(monkeypatch):
    monkeypatch.setattr(backends, "EXTENSION", None)
    monkeypatch.setattr(backends, "_REASON", "stale build: for a test")
    assert backends.available()["cpp"] == "stale build: for a test"
    with pytest.raises(RuntimeError, match="'cpp' was asked for but stale build: for a test"):
        zeros = torch.zeros(1, 1, 2, 4)
        append_kv_(zeros, zeros, zeros, zeros, torch.zeros(1, dtype=torch.int32), backend="cpp")


def test_cpp_runs_on_the_cpu_only():
    if backends.EXTENSION is None:
        pytest.skip(backends.available()["cpp"])
    with pytest.raises(RuntimeError, match="tensors are on cuda:0"):
        backends.resolve("cpp", CUDA)


def test_a_build_for_other_fields_is_stale(monkeypatch):
    if backends.EXTENSION is None:
        pytest.skip(backends.available()["cpp"])
    monkeypatch.setattr(backends, "FIELDS", backends.FIELDS[:-1])
    module, reason = backends._load()
    assert module is None and reason.startswith("stale build")


def test_import_starts_no_cuda_context():
    done = run("import cllm_kernels.ops, torch; assert not torch.cuda.is_initialized()")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(backends.EXTENSION is None, reason=str(backends.available()["cpp"]))
class TestExtension:
    def test_build_info(self):
        info = backends.EXTENSION.build_info()
        assert set(info) == {"compiler", "compiler_version", "flags", "isas", "openmp", "cuda"}
        assert "-O3" in info["flags"] and info["isas"][0] == "baseline" and info["cuda"] is None
        assert set(backends.EXTENSION.cpu_isas()) <= set(info["isas"])

    def test_environment_chooses_the_instruction_set(self):
        code = "import cllm_kernels.backends as b; print(b.EXTENSION.cpu_isa())"
        for isa in backends.EXTENSION.cpu_isas():
            assert run(code, CLLM_CPU_ISA=isa).stdout.strip() == isa
        assert run(code, CLLM_CPU_ISA="").stdout.strip() == backends.EXTENSION.cpu_isas()[-1]

    def test_unknown_instruction_set(self):
        done = run("import cllm_kernels.backends as b; b.EXTENSION.cpu_isa()", CLLM_CPU_ISA="mmx")
        assert "ValueError: instruction set 'mmx' was asked for; this build on this CPU has baseline" in done.stderr
        with pytest.raises(ValueError, match="instruction set 'sse9'"):
            backends.EXTENSION.select_cpu_isa("sse9")

    def test_one_openmp_runtime(self):
        """Two would keep two pools of threads, which spin against each other."""
        if not Path("/proc/self/maps").exists():
            pytest.skip("no /proc/self/maps here")
        done = run(
            "import cllm_kernels.backends as b; assert b.EXTENSION\n"
            "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'libomp' in line})"
        )
        assert len(done.stdout.split()) == 1, done.stdout
