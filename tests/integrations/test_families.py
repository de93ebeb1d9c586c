"""Model families: exact with block attention, exact with their own, or refused with the reason."""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from families import EXACT, FAMILIES, NATIVE, TABLE, make_family, table
from helpers import make_prompts

from cllm_kernels import JacobiConfig, JacobiGenerator, backends

GREEDY = dict(do_sample=False, max_new_tokens=24)
BACKENDS = [name for name, reason in backends.available().items() if reason is None and name != "triton"]
OUTCOMES: dict[str, tuple[str, str]] = {}


def missing(name: str) -> bool:
    """Whether this release of transformers is too old for a family; the newest has all of them."""
    return not hasattr(transformers, FAMILIES[name][0])


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    if missing(name):
        pytest.skip(f"transformers {transformers.__version__} has no {FAMILIES[name][0]}")
    model = make_family(name)
    if name not in EXACT:
        with pytest.raises(NotImplementedError) as refusal:
            JacobiGenerator(model).generate(**make_prompts(1), **GREEDY)
        OUTCOMES[name] = ("none", f"refused: {refusal.value}")
        return
    attention = "native" if name in NATIVE else "block"
    for rows in (1, 4):
        inputs = make_prompts(rows)
        expected = model.generate(**inputs, **GREEDY)
        assert len(expected[:, 12:].unique()) > 4 * rows, "outputs that repeat themselves show little"
        for mode, backend in [*(("window", backend) for backend in BACKENDS), ("block", "auto")]:
            generator = JacobiGenerator(model, JacobiConfig(block_size=6, mode=mode, backend=backend))
            assert torch.equal(generator.generate(**inputs, **GREEDY), expected), (rows, mode, backend)
            assert generator.statistics.attention == attention
    OUTCOMES[name] = (attention, "exact")


def test_the_table_is_what_the_tests_found():
    """With CLLM_WRITE_TABLES=1 in the environment, the table is written anew."""
    if set(OUTCOMES) != set(FAMILIES):
        pytest.skip(f"{len(FAMILIES) - len(OUTCOMES)} families did not run in this process: nothing to compare")
    if os.environ.get("CLLM_WRITE_TABLES"):
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(table({name: OUTCOMES[name] for name in FAMILIES}))
    assert TABLE.read_text() == table({name: OUTCOMES[name] for name in FAMILIES})
