"""Model families: exact with block attention, exact with their own, or refused with the reason.

As a script it writes the table of them: ``PYTHONPATH=tests python tests/integrations/test_families.py``.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from families import EXACT, FAMILIES, NATIVE, make_family
from helpers import Planted, make_prompts
from packaging.version import Version

from cllm_kernels import JacobiConfig, JacobiGenerator, backends
from cllm_kernels.decoding import loop

TABLE = Path(__file__).parents[2] / "docs" / "families.md"
HEAD = ["| family | configuration | special | attention | result |", "|---|---|---|---|---|"]
GREEDY = dict(do_sample=False, max_new_tokens=24)
BACKENDS = [name for name, reason in backends.available().items() if reason is None and name != "triton"]


def decodes(name: str) -> str:
    """The table's row of a family, when it does what is expected of it."""
    class_name, _, special = FAMILIES[name]
    model = make_family(name)
    if name not in EXACT:
        with pytest.raises(NotImplementedError) as refusal:
            JacobiGenerator(model).generate(**make_prompts(1), **GREEDY)
        reason = re.sub(r" \(layer types .*\)", "", str(refusal.value))  # releases name these differently
        return f"| {name} | `{class_name}` | {special} | none | refused: {reason} |"
    changed = NATIVE.get(name)
    native = name in NATIVE and (changed is None or Version(transformers.__version__) < Version(changed))
    attention = "native" if native else "block"
    described = f"block; native before transformers {changed}" if changed else attention
    for rows in (1, 4):
        inputs = make_prompts(rows)
        expected = model.generate(**inputs, **GREEDY)
        assert len(expected[:, 12:].unique()) > 4 * rows, "outputs that repeat themselves show little"
        configs = [JacobiConfig(block_size=6, backend=backend) for backend in BACKENDS]
        configs += [JacobiConfig(block_size=6, mode="block"), JacobiConfig(block_size=6, candidates=3)]
        for config in configs:
            generator = JacobiGenerator(model, config)
            planted = functools.partial(Planted, expected=expected[:, 12:].tolist(), seed=rows)
            with mock.patch.object(loop, "LookupDrafts", planted):
                assert torch.equal(generator.generate(**inputs, **GREEDY), expected), (rows, config)
            assert generator.statistics.attention == attention
            assert config.candidates == 1 or sum(generator.statistics.chosen[1:]) > rows
    return f"| {name} | `{class_name}` | {special} | {described} | exact |"


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    if not hasattr(transformers, FAMILIES[name][0]):  # the newest has them all
        pytest.skip(f"transformers {transformers.__version__} has no {FAMILIES[name][0]}")
    assert decodes(name) in TABLE.read_text().splitlines()


def test_the_table_has_no_other_rows():
    lines = TABLE.read_text().splitlines()
    assert lines[:2] == HEAD
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(FAMILIES)


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join([*HEAD, *map(decodes, FAMILIES), ""]))
