"""The CUDA sources under the emulation: every tile of attention, and what the tests of the ops do not reach."""

import math
import os
import subprocess
import sys
from pathlib import Path

import emulated_cuda
import pytest
import torch
from test_block_attention import ATOL, check, expected_branches, make, reference

from cllm_kernels import backends
from cllm_kernels.ops import append_kv_, block_attention

pytestmark = pytest.mark.skipif(emulated_cuda.reason() is not None, reason=str(emulated_cuda.reason()))
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def emulated(emulation):
    pass


@pytest.mark.parametrize("dims", [(32, 64), (96, 80), (128, 128), (256, 200)], ids=str)
@pytest.mark.parametrize("width", [5, 9, 31], ids=["16-rows", "32-rows", "64-rows"])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 200}, {"softcap": 3.0, "sliding_window": 40}], ids=["plain", "window", "cap"]
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_tiles(dtype, options, width, dims):
    """Every compiled head size and tile of rows, over several splits."""
    assert backends.CUDA.attention_workspace(1, width, 6, 2, 700 + width + 5, *dims)[0] > 0
    check("cuda", options, heads=6, kv_heads=2, width=width, lengths=[700, 333], starts=[0, 100], dim=dims[0],
          value_dim=dims[1], dtype=dtype)  # fmt: skip


@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 5}], ids=["plain", "window"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_branches_in_each_tile(dtype, options, group):
    """Of 16, 32 and 64 rows, over several splits and several tiles."""
    for count, branch in ((3, 1), (2, 8), (6, 4), (3, 13)):
        arguments, out, lse, error = expected_branches(
            2 * group, count * branch, branch, 700, tuple(options.items()), dtype
        )
        got, got_lse = block_attention(*arguments, branch=branch, backend="cuda", **options)
        assert (got.double() - out).abs().max().item() <= 2 * error + ATOL
        torch.testing.assert_close(got_lse.double(), lse, rtol=1e-6, atol=ATOL)


@pytest.mark.parametrize("capacity", [40, 700, 9000])
def test_splits_are_merged_where_it_says(capacity):
    """One split needs no workspace; those of few rows are merged by the last block, of many by a kernel of their own."""
    for width, in_block in ((1, True), (16, False)):
        floats, tickets = backends.CUDA.attention_workspace(2, width, 32, 8, capacity, 128, 128)
        assert (floats > 0, tickets > 0) == (capacity > 40, capacity > 40 and in_block)


@pytest.mark.parametrize("length", [5, 1200])
@pytest.mark.parametrize("width", [2, 16])
def test_sinks_after_a_merge(width, length):
    arguments = make(6, 2, width, [length, 2], dtype=torch.bfloat16)
    sinks = torch.tensor([-1.0, 0.0, 3.0, -math.inf, 20.0, 0.5])
    out, lse = reference(*arguments, sinks=sinks, dtype=torch.float64)
    got, got_lse = block_attention(*arguments, sinks=sinks, backend="cuda")
    torch.testing.assert_close(got.double(), out, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got_lse.double(), lse, rtol=1e-6, atol=ATOL)


@pytest.mark.parametrize("place", [0, 250, 702])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("width", [5, 9, 31])
def test_a_broken_value_breaks_those_that_see_it(width, value, place):
    """In a step that all rows see, and in one that some see, in each tile."""
    query, keys, values, lengths, starts = make(6, 2, width, [700, 400], dtype=torch.float16, dim=64)
    clean, clean_lse = block_attention(query, keys, values, lengths, starts, sliding_window=600, backend="cuda")
    values[0, 1, place, 33] = value
    out, lse = block_attention(query, keys, values, lengths, starts, sliding_window=600, backend="cuda")
    assert torch.equal(lse, clean_lse)
    positions = 700 + torch.arange(width)
    sees = torch.zeros_like(out, dtype=torch.bool)
    sees[0, :, 3:, 33] = ((positions >= place) & (place > positions - 600))[:, None]
    assert not out[sees].isfinite().any()
    assert torch.equal(out[~sees], clean[~sees])


def test_lengths_that_do_not_fit_are_neither_written_nor_read(monkeypatch):
    """A GPU's lengths are not checked by the host."""
    for module in ("append_kv", "block_attention"):
        monkeypatch.setattr(sys.modules[f"cllm_kernels.ops.{module}"], "check_room", lambda *arguments: None)
    store = torch.zeros(3, 2, 40, 8, dtype=torch.float16)
    cache, other = store[:, :, 10:30], store.clone()[:, :, 10:30]
    ones = torch.ones(3, 2, 4, 8, dtype=torch.float16)
    append_kv_(cache, other, ones, ones, torch.tensor([-2, 18, 2**31 - 5], dtype=torch.int32), backend="cuda")
    assert cache[0, 0].sum(1).nonzero().flatten().tolist() == [0, 1]
    assert cache[1, 0].sum(1).nonzero().flatten().tolist() == [18, 19]
    assert store[2].sum() == 0 and store[:, :, :10].sum() == 0 and store[:, :, 30:].sum() == 0


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="this is the sanitized run")
def test_sanitizers_find_nothing():
    """AddressSanitizer and UBSan over each kernel: accesses beyond tensors and shared memory, undefined behaviour."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("g++ has no sanitizers here")
    environment = os.environ | {
        "LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1",
        "CLLM_EMULATION_SANITIZE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    folder = Path(__file__).parent
    command = [
        # -s: a sanitizer ends the process, and what pytest captured would be lost.
        sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", folder / "test_cuda_kernels.py",
        folder / "test_append_kv.py", folder / "test_converge.py",
        "-k", "not torch.float16 and (test_cuda_kernels or cuda-emulated and not opcheck and not bad_input and not "
        "distributed and not oracle and not 70001)",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "test_sanitizers" not in done.stdout and " passed" in done.stdout
