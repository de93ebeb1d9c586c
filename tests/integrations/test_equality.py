"""Over families, processors, sampling, batches and every option: the tokens are those of AR decoding."""

from __future__ import annotations

import functools
import inspect
import sys
import textwrap
from collections import Counter
from unittest import mock

import pytest
import torch
from families import EXACT, make_family
from helpers import EOS, VOCABULARY, Planted, make_prompts
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_processing import OPTIONS as PROCESSORS
from test_sampling import WARPERS

import cllm_kernels.ops.converge as converge_module
from cllm_kernels import JacobiConfig, JacobiGenerator, backends, verify
from cllm_kernels.decoding import JacobiCache, loop
from cllm_kernels.decoding.branches import Branches

attention_module = sys.modules["cllm_kernels.ops.block_attention"]  # the package's attribute is the function
pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
CASES = 2000
BACKENDS = [name for name, reason in backends.available().items() if reason is None and name != "triton"]
NAMES = sorted(EXACT)
model_of = functools.cache(make_family)

case = st.fixed_dictionaries(
    dict(
        family=st.sampled_from(NAMES),
        rows=st.integers(1, 8),
        width=st.integers(5, 14),
        prompt_seed=st.integers(0, 1000),
        block_size=st.integers(2, 9),
        mode=st.sampled_from(["window", "block"]),
        draft=st.sampled_from(["context", "last", "lookup", "auto"]),
        adaptive=st.booleans(),
        candidates=st.sampled_from([1, 2, 2, 3, 4]),
        blocks=st.sampled_from([1, 1, 1, 2, 3]),
        max_batch_size=st.sampled_from([None, None, 1, 3, 5]),
        backend=st.sampled_from(BACKENDS),
        max_new_tokens=st.integers(1, 14),
        eos=st.lists(st.integers(3, VOCABULARY - 1), max_size=6, unique=True).map(tuple),
        processors=st.sampled_from(["none", "none", *sorted(PROCESSORS)]),
        warpers=st.sampled_from(["greedy", "greedy", *sorted(WARPERS)]),
        seed=st.integers(0, 2**32 - 1),
    )
)


def check(case, chosen):
    """Greedy tokens are those of transformers' generate; sampled ones those of one token at a time, and the coupled samples
    of native forwards. Counts in `chosen` whether a candidate was better than the window."""
    model, inputs = model_of(case["family"]), make_prompts(case["rows"], case["width"], case["prompt_seed"])
    options = dict(max_new_tokens=case["max_new_tokens"], eos_token_id=[EOS, *case["eos"]])
    options |= {} if case["processors"] == "none" else PROCESSORS[case["processors"]]
    sampling = case["warpers"] != "greedy"
    options |= dict(do_sample=True) | WARPERS[case["warpers"]] if sampling else dict(do_sample=False)
    names = ("block_size", "mode", "draft", "adaptive", "candidates", "blocks", "backend", "seed")
    config = {name: case[name] for name in names}
    if case["processors"] == "none" and case["warpers"] != "all":  # others may know rows by number
        config["max_batch_size"] = case["max_batch_size"]
    if case["adaptive"] or case["draft"] == "auto" or case["blocks"] > 1:
        config["mode"] = "window"
    alone = JacobiConfig(draft="none", seed=case["seed"])
    reference = JacobiGenerator(model, alone) if sampling else model
    expected = reference.generate(**inputs, **options)
    generator = JacobiGenerator(model, JacobiConfig(**config))
    planted = functools.partial(Planted, expected=expected[:, case["width"] :].tolist(), seed=case["prompt_seed"])
    with mock.patch.object(loop, "LookupDrafts", planted):
        got = generator.generate(**inputs, **options)
    for branch, times in enumerate(generator.statistics.chosen):
        chosen[branch > 0] += times
    lengths = [row.tokens for row in generator.statistics.rows]
    if sampling:
        assert torch.equal(got, expected)
        certificate = verify(model, **inputs, output=got, seed=case["seed"], lengths=lengths, **options)
        assert certificate.lossless, certificate
        assert list(certificate.tokens) == lengths
        for row, count in zip(got[:, case["width"] :].tolist(), lengths, strict=True):
            assert count == case["max_new_tokens"] or row[count - 1] in options["eos_token_id"]
    else:
        assert torch.equal(got, expected)


def hold(examples, chosen=None, **fixed):
    """Runs the property; returns how many rows it decoded, each with a prompt of its own."""
    seen, chosen = {}, Counter() if chosen is None else chosen

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=case)
    def run(case):
        case |= fixed
        key = tuple(case.values())
        if key not in seen:
            check(case, chosen)
            seen[key] = case["rows"]

    run()
    return sum(seen.values())


def test_equality():
    chosen = Counter()
    assert hold(600, chosen) >= CASES
    assert chosen[False] > 100 and chosen[True] > 500, "candidates must have been worse than the window, and better"


hold_once = functools.cache(hold)


# What a planted mistake changes, where, the right line, the wrong one, and cases that it must show in.
MUTANTS = {
    "an accept length that is one too long": (
        converge_module, "reference", "accept = 1 + agreed.cumprod(1).sum(1)",
        "accept = (2 + agreed.cumprod(1).sum(1)).clamp(max=width)", dict(candidates=1),
    ),
    "a branch that sees the last row of the one before": (
        attention_module, "visible_rows", "(columns >= first)", "(columns >= first - 1)", {},
    ),
    "a branch that does not see its first row": (
        attention_module, "visible_rows", "(columns >= first)", "(columns >= first + (first > lengths))", {},
    ),
    "a sliding window that counts rows": (
        attention_module, "visible_rows", "lengths + columns - first", "columns", dict(family="Mistral"),
    ),
    "positions that go on from branch to branch": (
        Branches, "choose_", "self.session.window_positions(width, count)",
        "self.session.window_positions(width)[:, :1] + torch.arange(count * width)", {},
    ),
    "keys of the row before": (
        JacobiCache, "take_branches", "source = length + branch * width", "source = length + branch * width - 1", {},
    ),
    "keys of the branch before": (
        JacobiCache, "take_branches", "source = length + branch * width", "source = length + (branch - 1) * width", {},
    ),
    "keys that stay where they are": (JacobiCache, "take_branches", "if branch == 0 or", "if True or", {}),
    "one key too few": (JacobiCache, "take_branches", "(branches, counts,", "(branches, [c - 1 for c in counts],", {}),
    "logits of another branch": (Branches, "choose_", "return logits[pick], scores[pick]", "return logits[:, 0], scores[:, 0]", {}),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_equality_finds(mistake, monkeypatch):
    owner, name, right, wrong, fixed = MUTANTS[mistake]
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert source.count(right) == 1
    names = dict(vars(sys.modules[owner.__module__] if inspect.isclass(owner) else owner))
    exec(compile("from __future__ import annotations\n" + source.replace(right, wrong), "mutant", "exec"), names)
    fixed = dict(candidates=3, backend="torch", draft="context", adaptive=False, max_new_tokens=14) | fixed
    hold_once(10, **fixed)
    monkeypatch.setattr(owner, name, names[name])
    with pytest.raises(AssertionError):
        hold(10, **fixed)
