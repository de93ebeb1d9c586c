"""Sampling: every way to decode draws the same tokens for the same seed, and they are the model's."""

from __future__ import annotations

import pytest
import torch
from helpers import EOS, FAMILIES, make_model, make_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_kernels import JacobiConfig, JacobiGenerator

MODELS = {family: make_model(family, seed=1) for family in FAMILIES}
WARPERS = {
    "plain": dict(top_k=0),
    "temperature": dict(top_k=0, temperature=0.3),
    "top_k": dict(top_k=5, temperature=0.8),
    "top_p": dict(top_k=0, top_p=0.7),
    "min_p": dict(top_k=0, min_p=0.2),
    "all": dict(top_k=20, top_p=0.9, min_p=0.05, temperature=1.4, repetition_penalty=1.2),
    "typical": dict(top_k=0, typical_p=0.8),
    "eta": dict(top_k=0, eta_cutoff=0.02, epsilon_cutoff=0.01),
}


def decode(model, inputs, options, **config):
    generator = JacobiGenerator(model, JacobiConfig(**config))
    return generator.generate(**inputs, do_sample=True, max_new_tokens=24, **options)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("name", WARPERS)
@pytest.mark.parametrize("rows", [1, 4])
def test_jacobi_draws_what_one_token_at_a_time_draws(rows, name, backend):
    model, inputs, options = MODELS["llama"], make_prompts(rows), WARPERS[name]
    expected = decode(model, inputs, options, draft="none", seed=5, backend=backend)
    for mode in ("window", "block"):
        for block_size in (2, 7):
            got = decode(model, inputs, options, block_size=block_size, mode=mode, seed=5, backend=backend)
            assert torch.equal(got, expected)
    assert not torch.equal(decode(model, inputs, options, draft="none", seed=6, backend=backend), expected)


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(sorted(WARPERS)),
    block_size=st.integers(2, 20),
    mode=st.sampled_from(["window", "block"]),
    draft=st.sampled_from(["context", "last", "lookup", "auto"]),
    eos=st.lists(st.integers(3, 96), max_size=5),
)
def test_on_any_options(family, rows, seed, name, block_size, mode, draft, eos):
    model, inputs = MODELS[family], make_prompts(rows, seed=seed)
    options = WARPERS[name] | {"eos_token_id": [EOS, *eos]}
    expected = decode(model, inputs, options, draft="none", seed=seed)
    mode = "window" if draft == "auto" else mode
    assert torch.equal(decode(model, inputs, options, block_size=block_size, mode=mode, draft=draft, seed=seed), expected)


def test_seeds():
    model, inputs, options = MODELS["qwen2"], make_prompts(3), WARPERS["plain"]
    rows = decode(model, inputs, options, seed=[3, 1, 3])
    for row, seed in enumerate((3, 1, 3)):
        pads = int((inputs["attention_mask"][row] == 0).sum())
        alone = decode(model, {"input_ids": inputs["input_ids"][row : row + 1, pads:]}, options, seed=seed)
        new = alone[0, 12 - pads :]
        assert rows[row, 12 : 12 + len(new)].tolist() == new.tolist()
    torch.manual_seed(0)
    first, second = (decode(model, inputs, options) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(decode(model, inputs, options), first) and not torch.equal(first, second)
    draws = [decode(model, inputs, options | {"generator": torch.Generator().manual_seed(4)}) for _ in range(2)]
    assert torch.equal(*draws)
    # greedy decoding takes nothing from the global generator
    before = torch.get_rng_state()
    JacobiGenerator(model).generate(**inputs, do_sample=False, max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_return_sequences_differ_and_repeat():
    model, inputs = MODELS["llama"], make_prompts(2)
    options = WARPERS["plain"] | {"num_return_sequences": 3}
    got = decode(model, inputs, options, seed=2)
    assert got.shape[0] == 6 and len({tuple(row) for row in got.tolist()}) == 6
    assert torch.equal(decode(model, inputs, options, seed=2, draft="none"), got)


def test_the_distribution_is_the_models():
    """Chi-square of the first two tokens over many rows against the probabilities that the model gives."""
    model = MODELS["llama"]
    prompt = make_prompts(1)["input_ids"]
    rows, kept = 3000, 6
    options = dict(do_sample=True, top_k=kept, temperature=1.3, eos_token_id=None)
    generator = JacobiGenerator(model, JacobiConfig(block_size=4, seed=9))
    tokens = generator.generate(prompt.expand(rows, -1), max_new_tokens=2, **options)[:, 12:]

    def probabilities(prefix):
        with torch.no_grad():
            logits = model(prefix).logits[0, -1] / 1.3
        return torch.where(logits >= logits.topk(kept).values[-1], logits, -torch.inf).softmax(-1)

    def statistic(drawn, wanted):
        counts, wanted = drawn.bincount(minlength=len(wanted)), wanted * len(drawn)
        assert not counts[wanted == 0].any()
        return ((counts - wanted) ** 2 / wanted)[wanted > 0].sum()

    # 99.99 % of 5 degrees of freedom lie below 25.7
    first = probabilities(prompt)
    assert statistic(tokens[:, 0], first) < 25.7
    for token in first.topk(3).indices.tolist():
        prefix = torch.cat((prompt, torch.tensor([[token]])), 1)
        assert statistic(tokens[tokens[:, 0] == token, 1], probabilities(prefix)) < 25.7
