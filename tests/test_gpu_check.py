"""What `make gpu-check` runs, as far as it can run without a GPU: with a stand-in for the graph, and for Python."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.profiler_util import Interval

from cllm_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("typer")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_time_in_which_the_device_works(benchmarks):
    import steps

    events = [SimpleNamespace(time_range=Interval(*at)) for at in ((40, 50), (0, 10), (5, 12), (6, 7), (50, 51))]
    assert steps.busy_seconds(events) == pytest.approx(23e-6) and steps.busy_seconds([]) == 0


def test_steps_of_a_gpu(benchmarks, monkeypatch, tmp_path):
    """Graphs of several steps, of the compiled forward too, with what the device does in them; the file grows."""
    import steps
    from helpers import COMMON, Frames
    from transformers import LlamaConfig

    launched, compiled = [], []

    def capture(step, count, running):
        def replay():
            launched.append(count)
            assert running > 0
            for _ in range(count):
                step()

        return replay

    def compiles(call, **options):
        compiled.append(options)
        return torch._dynamo.optimize(Frames())(call)

    monkeypatch.setattr(steps, "capture", capture)
    monkeypatch.setattr(steps, "has_graphs", lambda device: True)
    monkeypatch.setattr(steps, "device_seconds", lambda run: (run(), 1e-9)[1])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "compile", compiles)
    monkeypatch.setattr(steps, "bandwidth", lambda threads: 1e9)
    monkeypatch.setattr(steps, "rate", lambda dtype, threads: 1e10)
    monkeypatch.setitem(steps.SHAPES, "tiny", lambda: LlamaConfig(**COMMON | {"max_position_embeddings": 4096}))
    path = tmp_path / "steps_tiny.json"
    steps.main(["tiny"], width=[1, 16], length=[32, 64], repeats=2, eager_width=[1], compiled_width=[16, 1], json_path=path)
    rows = {(row["method"], row["block_size"], row["cache_length"]): row for row in json.loads(path.read_text())}
    each = {("hf_eager", 1), ("ours", 1), ("ours_graph", 1), ("ours_graph", 16)}
    first = each | {("hf_compiled", 1), ("ours_compiled_graph", 1), ("ours_compiled_graph", 16)}
    assert set(rows) == {(*key, 32) for key in first} | {(*key, 64) for key in each}
    assert set(launched) == {steps.CHUNK} and [options.get("mode") for options in compiled] == ["reduce-overhead", None, None]
    for row in rows.values():
        assert row["ms"] > 0 and 0.9 < row["host_gap"] < 1 and row["over_weights"] == pytest.approx(row["ms"] / row["weights_ms"])
    eager, one = rows["hf_eager", 1, 32], rows["ours_graph", 1, 32]
    assert eager["over_ours_1"] == pytest.approx(eager["ms"] / one["ms"]) and eager["over_hf_eager"] == 1
    for method in ("ours_graph", "ours_compiled_graph"):
        wide, one = rows[method, 16, 32], rows[method, 1, 32]
        assert wide["over_ours_1"] == pytest.approx(wide["ms"] / one["ms"]) and one["over_ours_1"] == 1


def row(method, n, ms, **facts):
    return {
        "shape": "llama-2-7b", "method": method, "block_size": n, "cache_length": 1024, "ms": ms, "ms_quartiles": [ms, ms],
        "floor_ms": 3.2, "over_weights": ms / 3, "over_ours_1": ms / 3.3, "over_hf_eager": 20 / ms, "host_gap": 0.01,
    } | facts  # fmt: skip


def report(parts, *failed):
    target = parts / "gpu.json"
    command = [sys.executable, ROOT / "benchmarks" / "gpu_report.py", parts, target, parts / "gpu.md", *failed]
    subprocess.run(command, check=True)
    return json.loads(target.read_text()), (parts / "gpu.md").read_text()


def test_report(tmp_path):
    """Each part as far as it is there; targets, and the projection by its name."""
    results, text = report(tmp_path, "build")
    assert results == {"gpu": "gpu", "failed": ["build"], "steps": []} and "failed or stopped: build" in text
    rows = [row("hf_eager", 1, 20.0, over_ours_1=None, host_gap=None), row("ours_graph", 16, 3.4)]
    (tmp_path / "steps_a.json").write_text(json.dumps(rows))
    (tmp_path / "steps_b.json").write_text(json.dumps([row("ours_compiled_graph", 16, 4.5, shape="llama-3-8b")]))
    cases = [{"name": "test_append_kv[x]", "extra_info": {"ours_s": 1e-6, "of_floor": 0.5, "alternatives_s": {"torch": 3e-6, "triton": 2e-6}}}]
    (tmp_path / "kernels_gpu.json").write_text(json.dumps({"benchmarks": cases}))
    results, text = report(tmp_path)
    assert len(results["steps"]) == 3 and results["failed"] == [] and "failed or stopped: none" in text
    (tmp_path / "decode.json").write_text('[{"method": "hf_')  # stopped while it was written
    results, text = report(tmp_path)
    assert len(results["steps"]) == 3 and "decode" not in results
    assert "| llama-2-7b |  | at most 1.15x of reading the weights once | 1.13x | reached |" in text
    assert "| llama-3-8b | compiled | at most 1.15x of reading the weights once | 1.50x | missed |" in text
    assert "| llama-2-7b |  | projection, above 800 tokens/s | 706 to 1000 tokens/s | in part |" in text
    assert "The projection is not a measurement" in text
    assert "| test_append_kv[x] | 1.0 | 2.00 | 3.00 | 50% |" in text


CASES = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "pytest_benchmark" else find(name, *rest)
import pytest
sys.exit(pytest.main(["-q", "-p", "no:benchmark", "-p", "no:cacheprovider", "--benchmark-only", *sys.argv[1:]]))
"""


@pytest.mark.skipif(
    backends.EXTENSION is None or torch.cuda.is_available(), reason="the case is one of the C++ kernels on a CPU"
)
def test_benchmarks_run_without_their_plugin(tmp_path):
    """GPU machines without a registry may lack it."""
    path = tmp_path / "kernels_gpu.json"
    command = [
        sys.executable, "-c", CASES, "benchmarks/test_kernels.py", f"--benchmark-json={path}",
        "-k", "append_kv and not rope and 8x4x32 and fp32",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    (case,) = json.loads(path.read_text())["benchmarks"]
    assert case["params"] == {"dtype": "fp32", "shape": "8x4x32"} and case["extra_info"]["ours_s"] > 0
    assert f"| {case['name']} |" in report(tmp_path)[1]


STUB = """#!/bin/bash
case "$*" in
  *get_device_capability*) [ -n "$NO_GPU" ] || echo "90 fake_gpu" ;;
  *gpu_report.py*) shift; exec {python} benchmarks/gpu_report.py "$@" ;;
  *setup.py*) echo "archs $CLLM_CUDA_ARCHS" ;;
  *steps.py*) echo '[]' > "${{@: -1}}"; exit 3 ;;
esac
"""


@pytest.fixture
def check(tmp_path):
    stub, out = tmp_path / "python", tmp_path / "out"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)

    def run(*stages, **environment):
        environment = os.environ | {"PYTHON": str(stub), "OUT": str(out)} | environment
        environment.pop("CLLM_CUDA_ARCHS", None)
        command = ["bash", "scripts/gpu_check.sh", *stages]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False), out

    return run


def test_a_failed_stage_does_not_stop_the_others(check):
    done, out = check("build", "compiled", "decode")
    assert done.returncode == 1 and done.stdout.endswith("failed: compiled\n"), done.stdout + done.stderr
    assert "archs 90" in done.stdout and "== decode took" in done.stdout
    assert json.loads((out / "fake_gpu.json").read_text())["failed"] == ["compiled"]
    assert "archs 90" in (out / "fake_gpu.log").read_text() and (out / "fake_gpu.md").exists()


def test_what_gpu_check_refuses(check):
    done, _ = check("builds")
    assert done.returncode == 2 and "no such stage: builds; there are build test steps" in done.stdout
    done, _ = check(NO_GPU="1")
    assert done.returncode == 1 and "there is no GPU that torch can use" in done.stdout


def test_all_stages_take_less_than_nine_minutes():
    script = (ROOT / "scripts" / "gpu_check.sh").read_text()
    limits, order = (script.split(f"{name}=(", 1)[1].split(")", 1)[0].split() for name in ("LIMIT", "ORDER"))
    limits = {name.strip("[]"): int(seconds) for name, seconds in (part.split("=") for part in limits)}
    assert limits["sanitize"] < limits["test"] and set(limits) == {*order, "sanitize", "report"}
    assert sum(limits[name] for name in order) + limits["report"] < 9 * 60
