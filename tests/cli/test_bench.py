"""`cllm bench` on the bundled CLLM, small."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from cllm_kernels.cli import bench as bench_module
from cllm_kernels.cli.app import app
from cllm_kernels.integrations.verification import Mismatch


def bench(tmp_path, *arguments):
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(
        app,
        ["bench", "--model", "cllm=models/spider-cllm", "--no-compiled", "--rounds", "1", "--json", str(path), *arguments],
    )
    return result, json.loads(path.read_text()) if path.exists() else None


def test_rows(tmp_path):
    result, rows = bench(tmp_path, "--prompts", "4", "--batch", "1", "--batch", "2", "--block-size", "8")
    assert result.exit_code == 0, result.output
    names = ["ar", "jacobi_window", "jacobi_window, torch's linears", "jacobi_adaptive", "jacobi_block", "jacobi_lookup", "jacobi_candidates"]
    names += ["jacobi_auto", "jacobi_auto_candidates"]
    assert [row["method"] for row in rows] == ["hf_ar", "hf_prompt_lookup", *names, "hf_ar", *names]
    for row in rows:
        assert row["equal_to_hf_ar"] == 1 and row["prompts"] == 4 and row["mismatches"] == 0 and row["dtype"] == "float32"
        assert row["tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0 and row["peak_memory_bytes"] > 0
        assert 0 <= row["exact_match"] <= 1 and len(row["speedup_quartiles"]) == 3
        if row["method"] == "jacobi_window":
            assert row["tokens_per_forward"] > 2 and row["fast_forwarded"] > 0 and row["steps"].keys() == {"context 8"}
        if row["method"] == "ar":
            assert row["tokens_per_forward"] == 1 and row["fast_forwarded"] == 0
    assert rows[0]["speedup"] == 1
    assert "jacobi_window" in result.output


def test_rows_that_wait(tmp_path):
    arguments = ("--prompts", "4", "--batch", "2", "--batch", "4", "--block-size", "8", "--max-batch-size", "2")
    result, rows = bench(tmp_path, *arguments)
    assert result.exit_code == 0, result.output
    (row,) = (row for row in rows if row["method"].endswith("rows at once"))
    assert row["method"] == "jacobi_lookup, 2 rows at once" and row["batch"] == 4 and row["equal_to_hf_ar"] == 1
    prompts_alone = next(row for row in rows if row["method"] == "jacobi_lookup" and row["batch"] == 4)
    assert row["tokens_per_forward"] == prompts_alone["tokens_per_forward"] and row["ms_per_forward"] > 0


def test_half_precision(tmp_path, monkeypatch):
    """What is not the argmax is counted, and whether it is a near-tie."""
    found = iter([[False], [True], [True, False]])

    def verify(model, output, **options):
        true = original(model, output=output, **options)
        assert true.lossless
        planted = [Mismatch(0, 0, 5, 6, 0.1, 0.2, near_tie) for near_tie in next(found, ())]
        return dataclasses.replace(true, mismatches=tuple(planted))

    original = bench_module.verify
    monkeypatch.setattr(bench_module, "verify", verify)
    result, rows = bench(tmp_path, "--prompts", "2", "--block-size", "8", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    counts = [(row["mismatches"], row["near_ties"]) for row in rows]
    assert counts == [(2, 1), (2, 1), *[(0, 0)] * (len(rows) - 2)]
    assert "1 of 2" in result.output


def test_other_texts(tmp_path):
    data = tmp_path / "gsm8k"
    data.mkdir()
    (data / "test.jsonl").write_text(json.dumps({"question": "Natalia sold 48 clips. How many?", "answer": "48"}) + "\n")
    result, rows = bench(tmp_path, "--workload", "gsm8k", "--data", str(tmp_path), "--max-new-tokens", "12")
    assert result.exit_code == 0, result.output
    assert all(row["equal_to_hf_ar"] == 1 and row["exact_match"] is None for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "mmlu"], "allowed are spider"),
        (["--dtype", "int8"], "allowed are float32, bfloat16"),
        (["--workload", "humaneval", "--data", "/nowhere"], "no prompts at"),
    ],
)
def test_refused(tmp_path, arguments, message):
    result, rows = bench(tmp_path, *arguments)
    assert result.exit_code == 2 and rows is None and message in " ".join(result.output.split())
