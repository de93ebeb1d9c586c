import json
import os
import subprocess
import sys
import warnings
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


class FakeCuda:
    """The module of a build with CUDA kernels, and the GPU under it."""

    LARGEST_HEAD_DIM = LARGEST_WINDOW = 256

    def __init__(self, monkeypatch, driver=13000, runtime=13000, capability=(9, 0), archs=(80, 90, 100), ptx=100):
        self.driver_version, self.runtime_version = lambda: driver, lambda: runtime
        self.build_info = lambda: {"cuda": {"archs": list(archs), "ptx": ptx}}
        backends._coverage_reason.cache_clear()
        backends._report.cache_clear()
        monkeypatch.setattr(backends, "CUDA", self)
        monkeypatch.setattr(backends, "EXTENSION", self)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        monkeypatch.delenv("CLLM_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def forget():
    """What was cached about a GPU that a test made up."""
    yield
    backends._coverage_reason.cache_clear()
    backends._report.cache_clear()


def test_auto(monkeypatch):
    monkeypatch.delenv("CLLM_BACKEND", raising=False)
    assert backends.resolve("auto", CPU) == ("torch" if backends.EXTENSION is None else "cpp")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "CUDA", None)
    assert backends.resolve("auto", CUDA) == "triton"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backends.resolve("auto", CUDA) == "torch"
    monkeypatch.setenv("CLLM_BACKEND", "torch")
    assert backends.resolve("auto", CPU) == "torch"
    monkeypatch.setenv("CLLM_BACKEND", "fastest")
    with pytest.raises(ValueError, match="backend is 'fastest'; allowed are 'auto', 'cpp', 'cuda', 'triton', 'torch'"):
        backends.resolve("auto", CPU)


def test_auto_follows_the_order_on_a_gpu(monkeypatch):
    FakeCuda(monkeypatch)
    assert backends.resolve("auto", CUDA) == backends.GPU_ORDER[0] == "cuda"
    assert backends.resolve("auto", CUDA, "the tensors are float32") == "triton"
    monkeypatch.setattr(backends, "GPU_ORDER", ("triton", "cuda", "torch"))
    assert backends.resolve("auto", CUDA) == "triton"
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.resolve("auto", CUDA) == "cuda"
    assert backends.resolve("auto", CUDA, "the tensors are float32") == "torch"
    with pytest.raises(ValueError, match="'cuda' was asked for but the tensors are float32"):
        backends.resolve("cuda", CUDA, "the tensors are float32")


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        ({"driver": 0}, "there is no CUDA driver"),
        ({"driver": 12040}, "the driver runs CUDA up to 12.4, and the kernels were built with 13.0"),
        ({"capability": (7, 5)}, "cuda:0 has compute capability 7.5, and the kernels were built for 8.0, 9.0, 10.0"),
        ({"capability": (9, 0), "archs": (80, 100)}, "cuda:0 has compute capability 9.0"),
        ({"capability": (8, 0), "archs": (86,), "ptx": 86}, "built for 8.6 and what is newer than 8.6"),
        ({"capability": (12, 0), "runtime": 13010}, "compile PTX of CUDA 13.1, and it runs CUDA up to 13.0"),
    ],
    ids=["no driver", "old driver", "old GPU", "between", "minor version", "PTX is newer than the driver"],
)
def test_a_gpu_that_cuda_cannot_use(monkeypatch, gpu, reason):
    """Told once; Triton runs. Asked for by name it is an error."""
    FakeCuda(monkeypatch, **gpu)
    with pytest.warns(UserWarning, match=reason):
        assert backends.resolve("auto", CUDA) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", CUDA) == "triton"
    with pytest.raises(RuntimeError, match=f"'cuda' was asked for but .*{reason}"):
        backends.resolve("cuda", CUDA)


@pytest.mark.parametrize("gpu", [{"capability": (8, 9)}, {"capability": (12, 0)}, {"driver": 13010}, {"driver": 14000}], ids=str)
def test_a_gpu_that_cuda_can_use(monkeypatch, gpu):
    """A later minor version, a later architecture through PTX, newer drivers."""
    FakeCuda(monkeypatch, **gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", CUDA) == backends.resolve("cuda", CUDA) == "cuda"


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Writes a table of measurements for a GPU that a test makes up."""
    path = tmp_path / "table.json"
    monkeypatch.setenv("CLLM_ATTENTION_TABLE", str(path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    backends.attention_table.cache_clear()
    yield lambda content: path.write_text(content)
    backends.attention_table.cache_clear()


def test_sizes_fall_into_cells():
    cell = backends.attention_cell
    assert cell(128, 16 * 7, 1040) == "D=128 rows=128 S=2048"
    assert cell(80, 1, 8) == "D=96 rows=16 S=512" and cell(200, 16, 512) == "D=256 rows=16 S=512"
    assert cell(64, 17, 513) == "D=64 rows=32 S=2048" and cell(64, 64, 2**20).endswith("S=2097152")


def test_auto_takes_cuda_where_it_was_as_fast(monkeypatch, table):
    FakeCuda(monkeypatch)
    slow, fast = backends.attention_cell(128, 64, 1040), backends.attention_cell(128, 64, 9000)
    table(f'{{"NVIDIA X": {{"{slow}": "triton", "{fast}": "cuda"}}, "NVIDIA Y": {{"{fast}": "triton"}}}}')
    assert backends.resolve("auto", CUDA, cell=slow) == backends.resolve("auto", CUDA, cell="unknown") == "triton"
    assert backends.resolve("auto", CUDA, cell=fast) == "cuda"
    assert backends.resolve("auto", CUDA) == backends.resolve("cuda", CUDA, cell=slow) == "cuda"
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.resolve("auto", CUDA, cell=slow) == "cuda"


@pytest.mark.parametrize("content", ["{", "[]", '{"NVIDIA X": 3}', '{"NVIDIA X": {"D=64": "cpp"}}', None])
def test_a_table_that_is_none(content, monkeypatch, table):
    FakeCuda(monkeypatch)
    if content is not None:
        table(content)
    with pytest.raises(ValueError, match=r"table.json is no table of benchmarks/attention_table.py \(CLLM_ATTENTION_TABLE\)"):
        backends.resolve("auto", CUDA, cell="any")
    assert backends.resolve("auto", CUDA) == "cuda"  # ops that have no table
    monkeypatch.setenv("CLLM_ATTENTION_TABLE", "")
    assert backends.resolve("auto", CUDA, cell="any") == "triton"


def test_the_table_of_the_package(monkeypatch):
    monkeypatch.delenv("CLLM_ATTENTION_TABLE", raising=False)
    for gpu, known in (("NVIDIA X", False), ("NVIDIA H100 80GB HBM3", True)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, gpu=gpu: gpu)
        backends.attention_table.cache_clear()
        assert bool(backends.attention_table(CUDA)) is known
    backends.attention_table.cache_clear()


def test_a_table_is_made_of_what_was_measured(table, tmp_path):
    def case(shape, width, length, ours, triton):
        others = {"sdpa": 9.0} | ({} if triton is None else {"triton": triton})
        parameters = {"shape": shape, "width": width, "length": length, "batch": 1}
        facts = {"ours_s": ours, "alternatives_s": others, "device": "NVIDIA X"}
        return {"name": "test_block_attention[...]", "params": parameters, "extra_info": facts}

    cases = [
        case("32x8x128", 16, 1024, 1.0, 2.0), case("28x4x128", 16, 1024, 3.0, 1.0),  # 64 and 112 rows
        case("32x8x128", 16, 4096, 1.01, 1.0), case("32x8x128", 64, 1024, 1.0, None),
        {"name": "test_converge[...]", "params": None, "extra_info": {"alternatives_s": {"triton": 1.0}}},
    ]  # fmt: skip
    measured = tmp_path / "kernels.json"
    measured.write_text(json.dumps({"benchmarks": cases}))
    table('{"NVIDIA Y": {"D=64 rows=16 S=512": "triton"}, "NVIDIA X": {"D=64 rows=16 S=512": "triton"}}')
    script = ROOT / "benchmarks" / "attention_table.py"
    done = subprocess.run(
        [sys.executable, script, measured, os.environ["CLLM_ATTENTION_TABLE"]], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
    )  # fmt: skip
    assert "at least as fast in 2 of 3 sizes" in done.stdout
    assert backends.attention_table(CUDA) == {
        "D=128 rows=128 S=2048": "triton", "D=128 rows=64 S=2048": "cuda", "D=128 rows=64 S=8192": "cuda",
    }  # fmt: skip


def test_two_gpus_of_different_architectures(monkeypatch):
    FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0) if device.index else (9, 0))
    assert backends.resolve("cuda", CUDA) == "cuda"
    with pytest.raises(RuntimeError, match="cuda:1 has compute capability 7.0"):
        backends.resolve("cuda", torch.device("cuda", 1))


def test_cuda_says_why_not(monkeypatch):
    monkeypatch.setattr(backends, "CUDA", None)
    reason = backends.available()["cuda"]
    assert reason.startswith("this build has no CUDA kernels" if backends.EXTENSION is not None else "cllm_kernels._C")
    with pytest.raises(RuntimeError, match="'cuda' was asked for but "):
        backends.resolve("cuda", CUDA)
    FakeCuda(monkeypatch)
    assert backends.available()["cuda"] is None
    with pytest.raises(RuntimeError, match="'cuda' was asked for but the tensors are on cpu; it runs on CUDA devices"):
        backends.resolve("cuda", CPU)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backends.available()["cuda"] == "this torch is built without CUDA"


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
        assert "-O3" in info["flags"] and info["isas"][0] == "baseline"
        if info["cuda"] is not None:
            assert set(info["cuda"]) == {"compiler", "flags", "archs", "ptx"}
            assert info["cuda"]["ptx"] == info["cuda"]["archs"][-1] and "-O3" in info["cuda"]["flags"]
        assert (info["cuda"] is None) == (backends.CUDA is None)
        assert set(backends.EXTENSION.cpu_isas()) <= set(info["isas"])

    def test_without_a_gpu_a_launch_is_an_error(self):
        """The runtime is linked in: the import needs no driver, and what fails is the call."""
        if backends.CUDA is None or torch.cuda.is_available():
            pytest.skip("no CUDA kernels in this build, or a GPU that runs them")
        assert backends.CUDA.runtime_version() >= 12000
        with pytest.raises(RuntimeError, match=r"CUDA: .*driver.* \(cudaError"):
            backends.CUDA.capture_id(0, 0)

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
