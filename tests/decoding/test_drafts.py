"""Draft sources and the choice among them. That no draft changes the output is shown in test_equals_ar.py."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import make_model, make_prompts
from transformers import LogitsProcessor

from cllm_kernels import JacobiConfig, JacobiGenerator
from cllm_kernels.decoding import AdaptiveChoice
from cllm_kernels.decoding.drafts import LookupDrafts
from cllm_kernels.ops import JacobiState

MODEL = make_model("llama", seed=4)


def state_for(prompt, width=6, starts=None):
    return JacobiState.create(torch.tensor(prompt), starts=starts, limits=50, block_size=width, refill="last")


def test_what_followed_the_last_tokens_follows_again():
    prompt = [[9, 5, 6, 7, 8, 5, 6], [1, 2, 3, 1, 2, 3, 1], [4, 5, 4, 6, 9, 8, 4]]
    state = state_for(prompt)
    before = state.window.clone()
    LookupDrafts(torch.tensor(prompt), [0, 0, 0]).propose_(state)
    assert state.window[0].tolist() == [6, 7, 8, 5, 6, 7]  # found, and goes on as a repetition
    assert state.window[1].tolist() == [1, 2, 3, 1, 2, 3]
    assert torch.equal(state.window[2], before[2])  # one token alone is not looked up
    changed = state.window != before
    assert torch.equal(state.since[changed], torch.ones_like(state.since[changed]))


def test_the_longest_match_and_the_latest_place_win():
    prompt = [[1, 2, 7, 3, 1, 2, 8, 9, 2, 4, 1, 2], [3, 1, 2, 7, 5, 1, 2, 8, 3, 9, 1, 2]]
    state = state_for(prompt, width=3)
    LookupDrafts(torch.tensor(prompt), [0, 0]).propose_(state)
    assert state.window[:, 1].tolist() == [8, 8]
    prompt = [[3, 1, 2, 7, 5, 1, 2, 8, 3, 1, 2]]
    state = state_for(prompt, width=3)
    LookupDrafts(torch.tensor(prompt), [0]).propose_(state)
    assert state.window[0].tolist() == [2, 7, 5]


def test_padding_is_not_looked_up():
    prompt = [[0, 0, 5, 0, 0, 0]]
    state = state_for(prompt)
    before = state.window.clone()
    LookupDrafts(torch.tensor(prompt), [5]).propose_(state)
    assert torch.equal(state.window, before)


def test_committed_tokens_and_rejected_predictions_are_remembered():
    state = state_for([[1, 2, 3]])
    drafts = LookupDrafts(torch.tensor([[1, 2, 3]]), [0])
    # committed 4 5; behind them predictions 6 7 8 that a later step rejects
    state.output[0, :2] = torch.tensor([4, 5])
    state.produced.fill_(2)
    state.iterations.fill_(1)
    state.window.copy_(torch.tensor([[5, 6, 7, 8, 30, 30]]))
    state.since.copy_(torch.tensor([[1, 1, 1, 1, 2, 2]]))  # the last two are refilled
    drafts.observe(state)
    state.output[0, 2:5] = torch.tensor([9, 6, 7])
    state.produced.fill_(5)
    state.iterations.fill_(2)
    state.window.copy_(torch.tensor([[7, 20, 21, 22, 23, 24]]))
    drafts.observe(state)
    drafts.propose_(state)
    assert state.window.tolist() == [[7, 8, 21, 22, 23, 24]]
    state.output[0, 5:8] = torch.tensor([2, 3, 4])
    state.produced.fill_(8)
    state.window.copy_(torch.tensor([[4, 0, 0, 0, 0, 0]]))
    drafts.observe(state)
    drafts.propose_(state)
    assert state.window.tolist() == [[4, 5, 9, 6, 7, 2]]  # out of what was committed


class Cycle(LogitsProcessor):
    """Makes an untuned model repeat a run of tokens."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[torch.arange(len(scores)), (input_ids[:, -1] + 1) % 11 + 10] = 100.0
        return scores


@pytest.mark.parametrize("draft", ["lookup", "auto"])
def test_lookup_gains_on_repetitions_with_an_untuned_model(draft):
    inputs = make_prompts(2)
    options = dict(do_sample=False, max_new_tokens=120, logits_processor=[Cycle()])
    expected = MODEL.generate(**inputs, **options)
    generator = JacobiGenerator(MODEL, JacobiConfig(draft=draft, block_size=8))
    assert torch.equal(generator.generate(**inputs, **options), expected)
    assert generator.statistics.tokens_per_forward > (4 if draft == "lookup" else 1.5)


def simulate(choice, rates, steps, seconds, noise=0.2):
    """rates: tokens of a step by (source, width); seconds: of a step by width. Returns how often each was used."""
    rng = random.Random(0)
    used = {}
    for _ in range(steps):
        arm = choice.next()
        used[arm] = used.get(arm, 0) + 1
        tokens = rates[arm]
        tokens = int(tokens) + (rng.random() < tokens % 1)
        choice.observe([tokens], seconds[arm[1]] * rng.uniform(1 - noise, 1 + noise))
    return used


RATES = {("context", 1): 1, ("lookup", 1): 1}
SECONDS = {16: 1.4, 8: 1.2, 4: 1.1, 1: 1.0}


@pytest.mark.parametrize(
    ("fast", "expected"),
    [
        ({("context", 16): 4.0, ("context", 8): 2.8}, ("context", 16)),
        ({("lookup", 8): 3.0, ("lookup", 16): 3.1}, ("lookup", 8)),
        ({}, ("context", 1)),
    ],
)
def test_the_choice_is_the_fastest(fast, expected):
    rates = {(source, width): 1.03 for source in ("context", "lookup") for width in (16, 8, 4)} | RATES | fast
    used = simulate(AdaptiveChoice(16, ("context", "lookup")), rates, 2000, SECONDS)
    assert used[expected] > 1700


def test_the_choice_follows_the_text():
    choice = AdaptiveChoice(16, ("context", "lookup"))
    rates = {(source, width): 1.03 for source in ("context", "lookup") for width in (16, 8, 4)} | RATES
    assert simulate(choice, rates, 3000, SECONDS)["context", 1] > 2700
    used = simulate(choice, rates | {("lookup", 16): 9.0, ("lookup", 8): 5.0, ("lookup", 4): 3.0}, 6000, SECONDS)
    assert used["lookup", 16] > 1000


def test_what_was_learnt_stays_with_the_generator():
    generator = JacobiGenerator(MODEL, JacobiConfig(draft="auto", block_size=8))
    for seed in range(4):
        generator.generate(**make_prompts(1, seed=seed), do_sample=False, max_new_tokens=60, eos_token_id=None)
    steps = generator.statistics.steps
    assert sum(steps.values()) == generator.statistics.forwards
    # the trials of the seven choices are over
    assert len(steps) < 7
