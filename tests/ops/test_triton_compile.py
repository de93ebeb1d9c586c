"""Every kernel and every configuration of the table becomes a cubin, fits and spills nothing, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cllm_kernels.triton import configs


@pytest.fixture(scope="module")
def compiled():
    script = Path(__file__).with_name("compile_triton.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("arch", configs.ARCHITECTURES, ids="sm_{}".format)
def test_kernels_fit(compiled, arch):
    rows = [row for row in compiled if row["arch"] == arch]
    names = {row["name"] for row in rows}
    assert len(names) == len(rows) >= len(configs.attention_configs()) + 8
    for dim, size, config in configs.attention_configs():
        assert f"attend D={dim} {'bf16' if size == 2 else 'fp32'} {config}" in names
    for size, config in configs.lm_head_configs():
        assert f"lm_head {'bf16' if size == 2 else 'fp32'} {config}" in names
    for row in rows:
        assert row["cubin"] > 0 and row["ptxas_reports"] > 0, row
        assert row["shared"] <= configs.SHARED_MEMORY[arch], row
        assert row["spilled"] == 0, row


