"""Over families, processors, sampling, batches and every option: the tokens are those of AR decoding."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from families import EXACT, make_family
from helpers import EOS, VOCABULARY, make_prompts
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_processing import OPTIONS as PROCESSORS
from test_sampling import WARPERS

import cllm_kernels.ops.converge as converge_module
from cllm_kernels import JacobiConfig, JacobiGenerator, backends, verify

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
        backend=st.sampled_from(BACKENDS),
        max_new_tokens=st.integers(1, 14),
        eos=st.lists(st.integers(3, VOCABULARY - 1), max_size=6, unique=True).map(tuple),
        processors=st.sampled_from(["none", "none", *sorted(PROCESSORS)]),
        warpers=st.sampled_from(["greedy", "greedy", *sorted(WARPERS)]),
        seed=st.integers(0, 2**32 - 1),
    )
)


def check(case):
    """Greedy tokens are those of transformers' generate; sampled ones are the coupled samples of native forwards."""
    model, inputs = model_of(case["family"]), make_prompts(case["rows"], case["width"], case["prompt_seed"])
    options = dict(max_new_tokens=case["max_new_tokens"], eos_token_id=[EOS, *case["eos"]])
    options |= {} if case["processors"] == "none" else PROCESSORS[case["processors"]]
    sampling = case["warpers"] != "greedy"
    options |= dict(do_sample=True) | WARPERS[case["warpers"]] if sampling else dict(do_sample=False)
    config = {name: case[name] for name in ("block_size", "mode", "draft", "adaptive", "backend", "seed")}
    if case["adaptive"] or case["draft"] == "auto":
        config["mode"] = "window"  # blocks have one width
    generator = JacobiGenerator(model, JacobiConfig(**config))
    got = generator.generate(**inputs, **options)
    lengths = [row.tokens for row in generator.statistics.rows]
    if sampling:
        certificate = verify(model, **inputs, output=got, seed=case["seed"], lengths=lengths, **options)
        assert certificate.lossless, certificate
        assert list(certificate.tokens) == lengths
        for row, count in zip(got[:, case["width"] :].tolist(), lengths, strict=True):
            assert count == case["max_new_tokens"] or row[count - 1] in options["eos_token_id"]
    else:
        assert torch.equal(got, model.generate(**inputs, **options))


def hold(examples, **fixed):
    """Runs the property; returns how many rows it decoded, each with a prompt of its own."""
    seen = {}

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=case)
    def run(case):
        case |= fixed
        key = tuple(case.values())
        if key not in seen:
            check(case)
            seen[key] = case["rows"]

    run()
    return sum(seen.values())


def test_equality():
    assert hold(600) >= CASES


def test_equality_finds_an_accept_length_that_is_one_too_long(monkeypatch):
    source = inspect.getsource(converge_module.reference)
    rule = "accept = 1 + agreed.cumprod(1).sum(1)"
    assert source.count(rule) == 1
    mutant = source.replace(rule, "accept = (2 + agreed.cumprod(1).sum(1)).clamp(max=width)")
    names = dict(vars(converge_module))
    exec(compile("from __future__ import annotations\n" + mutant, "mutant", "exec"), names)
    hold(10, backend="torch")
    monkeypatch.setattr(converge_module, "reference", names["reference"])
    with pytest.raises(AssertionError):
        hold(10, backend="torch")
