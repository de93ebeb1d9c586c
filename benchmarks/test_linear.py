"""Times of `window_linear` against torch's linear and oneDNN's with packed weights.

    pytest benchmarks/test_linear.py --benchmark-json=linear.json

On the CPU alone. Each call takes the next of many copies of the weights, so that none lies in a cache; the bundled
model's shapes stay in the cache, as they do when it decodes.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from measure import BACKEND, ON_GPU, compare

from cllm_kernels.ops import window_linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLD_BYTES = 160 << 20  # several times the last cache
# (N, K): Qwen2.5-0.5B's MLP, both ways, a square, its attention; then the bundled model's.
COLD = {"4864x896": (4864, 896), "896x4864": (896, 4864), "2048x2048": (2048, 2048), "896x896": (896, 896)}
WARM = {"688x256": (688, 256), "256x688": (256, 688), "256x256": (256, 256), "1024x256": (1024, 256)}
ROWS = (1, 2, 4, 8, 16, 32, 64)

pytestmark = pytest.mark.skipif(ON_GPU or BACKEND != "cpp", reason="window_linear is a C++ op for CPUs")


def packed(weights, rows):
    """torch's linear on weights that oneDNN has packed for this number of rows; None where it cannot."""
    try:
        return [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]
    except (AttributeError, RuntimeError):
        return None


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", {**COLD, **WARM})
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(benchmark, report, dtype, shape, rows):
    outputs, inputs = {**COLD, **WARM}[shape]
    size = outputs * inputs * DTYPES[dtype].itemsize
    copies = -(-COLD_BYTES // size) if shape in COLD else 1
    weights = [torch.randn(outputs, inputs).to(DTYPES[dtype]) for _ in range(copies)]
    x = torch.randn(rows, inputs).to(DTYPES[dtype])
    # One counter for all: what one of them has just read is not what the next one reads.
    turn = itertools.count()
    def following(some):
        return some[next(turn) % copies]

    alternatives = {"F.linear": lambda: F.linear(x, following(weights))}
    with torch.inference_mode():
        reordered = packed(weights, rows)
        if reordered is not None:
            alternatives["oneDNN, packed"] = lambda: torch.ops.mkldnn._linear_pointwise(
                x, following(reordered), None, "none", [], ""
            )
        compare(
            benchmark,
            report,
            lambda: window_linear(x, following(weights)),
            alternatives,
            flops=2 * rows * outputs * inputs,
            nbytes=size,
            dtype=DTYPES[dtype],
        )
