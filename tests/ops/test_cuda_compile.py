"""Every CUDA kernel compiles for every architecture of the build, fits and spills nothing, without a GPU."""

import shutil

import compile_cuda
import pytest

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None or not (compile_cuda.ROOT / "csrc" / "cuda").is_dir(), reason="no nvcc, or no sources"
)

# Bytes of shared memory of a multiprocessor and of one block (CUDA C++ Programming Guide, table of compute
# capabilities), and how many blocks of attention should run on a multiprocessor at least; one of eight
# warps is enough.
SHARED = {80: (164, 163, 1), 90: (228, 227, 2), 100: (228, 227, 2), 120: (100, 99, 1)}
REGISTERS = 65536
RESERVED = 1024  # bytes of shared memory that CUDA takes for each block


@pytest.fixture(scope="module")
def compiled():
    rows = compile_cuda.run()
    print(compile_cuda.table(rows))  # pytest -s shows it
    return rows


@pytest.mark.parametrize("arch", SHARED, ids="sm_{}".format)
def test_kernels_fit(compiled, arch):
    rows = [row for row in compiled if row["arch"] == arch]
    names = {row["name"] for row in rows}
    assert len(names) == len(rows)
    # 4 head sizes x 3 tiles x 2 types of attention, 2 merges, 3 types x greedy or sampled, 3 vectors x 6 types.
    assert {kernel: sum(name.startswith(kernel) for name in names) for kernel in ("at", "me", "co", "ap")} == {
        "at": 24, "me": 2, "co": 6, "ap": 18,
    }  # fmt: skip
    total, most, blocks = SHARED[arch]
    for row in rows:
        assert row["spilled"] == 0 and row["stack"] == 0, row
        assert row["shared"] <= most * 1024, row
        by_registers = REGISTERS // (-(-row["registers"] // 8) * 8 * row["threads"])
        by_shared = total * 1024 // (row["shared"] + RESERVED)
        fitting = min(by_registers, by_shared)
        assert fitting >= blocks or (fitting == 1 and row["threads"] >= 256), row
