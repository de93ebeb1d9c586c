"""Draft sources and the choice among them. That no draft changes the output is shown in test_equals_ar.py."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from helpers import Planted, make_model, make_prompts
from transformers import LogitsProcessor, StoppingCriteria

from cllm_kernels import JacobiConfig, JacobiGenerator
from cllm_kernels.decoding import AdaptiveChoice, JacobiCache, LoneToken, loop
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
    assert torch.equal(state.window[2], before[2])  # one token alone is not looked up yet
    changed = state.window != before
    assert torch.equal(state.since[changed], torch.ones_like(state.since[changed]))


def test_one_token_alone_is_looked_up_where_that_pays():
    prompt = [[4, 5, 4, 6, 9, 8, 4]]
    state = state_for(prompt, width=3)
    lookup = LookupDrafts(torch.tensor(prompt), [0])
    state.window[0, 1:] = torch.tensor([7, 7])

    def step(*committed):
        produced = int(state.produced)
        state.output[0, produced : produced + len(committed)] = torch.tensor(committed)
        state.produced.add_(len(committed))
        state.window.copy_(torch.tensor([[committed[-1], 7, 7]]))
        lookup.observe(state)

    lookup.propose_(state)
    assert state.window.tolist() == [[4, 7, 7]]
    step(6, 4)  # what came behind 4 last, and not the draft
    assert lookup.learnt() == 1
    lookup.propose_(state)
    assert state.window.tolist() == [[4, 6, 4]]  # all that is known behind the last 4, which goes on as it began
    step(7, 7, 7, 4)  # now the draft was right
    assert lookup.learnt() == pytest.approx(-0.05)
    lookup.propose_(state)
    step(9, 4)  # both were wrong, and the same
    assert lookup.learnt() == pytest.approx(-0.05)
    lookup.propose_(state)
    assert state.window.tolist() == [[4, 7, 7]]
    step(8)  # both were wrong
    assert lookup.learnt() == pytest.approx(-0.05 * 0.95)
    # the next prompt begins with what others taught
    for score, drafts in ((0.5, [6, 9]), (-0.5, [7, 7])):
        state = state_for(prompt, width=3)
        state.window[0, 1:] = torch.tensor([7, 7])
        LookupDrafts(torch.tensor(prompt), [0], lone=LoneToken(score)).propose_(state)
        assert state.window.tolist() == [[4, *drafts]]


def test_a_generator_remembers_whether_one_token_alone_pays():
    generator = JacobiGenerator(MODEL, JacobiConfig(draft="lookup", block_size=4))
    options = dict(do_sample=False, max_new_tokens=30, logits_processor=[Cycle()])
    expected = MODEL.generate(**make_prompts(2), **options)
    scores = []
    for _ in range(2):
        assert torch.equal(generator.generate(**make_prompts(2), **options), expected)
        scores.append(generator._memory["lone",].score)
    assert scores[0] != 0 and scores[1] != scores[0]


def test_the_longest_match_and_the_latest_place_win():
    prompt = [[1, 2, 7, 3, 1, 2, 8, 9, 2, 4, 1, 2], [3, 1, 2, 7, 5, 1, 2, 8, 3, 9, 1, 2]]
    state = state_for(prompt, width=3)
    LookupDrafts(torch.tensor(prompt), [0, 0]).propose_(state)
    assert state.window[:, 1].tolist() == [8, 8]
    prompt = [[6, 3, 1, 2, 7, 5, 1, 2, 8, 6, 3, 1, 2]]
    state = state_for(prompt, width=3)
    LookupDrafts(torch.tensor(prompt), [0]).propose_(state)
    assert state.window[0].tolist() == [2, 7, 5]


def test_candidates_are_the_other_places_and_recycled_predictions():
    prompt = [[3, 1, 2, 7, 5, 1, 2, 8, 3, 9, 1, 2], [4, 4, 4, 4, 4, 4, 4, 1, 2, 9, 1, 2]]
    state = state_for(prompt, width=3)
    lookup = LookupDrafts(torch.tensor(prompt), [0, 7])
    window = state.window.tolist()
    assert lookup.candidates(state, 2).tolist() == [[window[0], [2, 8, 3]], [window[1], [2, 9, 1]]]
    assert lookup.candidates(state, 9).tolist() == [[window[0], [2, 8, 3], [2, 7, 5]], [window[1], [2, 9, 1], window[1]]]
    # what the window has already is no candidate, nor is a row that is done
    lookup.propose_(state)
    assert state.window.tolist() == [[2, 8, 3], [2, 9, 1]]
    assert lookup.candidates(state, 2).tolist() == [[[2, 8, 3], [2, 7, 5]], [[2, 9, 1]] * 2]
    state.done[0] = 1
    assert lookup.candidates(state, 2) is None


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
    state.output[0, 2:6] = torch.tensor([9, 5, 6, 7])
    state.produced.fill_(6)
    state.iterations.fill_(2)
    state.window.copy_(torch.tensor([[7, 20, 21, 22, 23, 24]]))
    drafts.observe(state)
    drafts.propose_(state)
    assert state.window.tolist() == [[7, 8, 21, 22, 23, 24]]
    state.output[0, 6:9] = torch.tensor([2, 3, 4])
    state.produced.fill_(9)
    state.window.copy_(torch.tensor([[4, 0, 0, 0, 0, 0]]))
    drafts.observe(state)
    drafts.propose_(state)
    assert state.window.tolist() == [[4, 5, 9, 5, 6, 7]]  # out of what was committed


class Cycle(LogitsProcessor):
    """Makes an untuned model repeat a run of tokens."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[torch.arange(len(scores)), (input_ids[:, -1] + 1) % 11 + 10] = 100.0
        return scores


@pytest.mark.parametrize(
    ("config", "least"), [(dict(draft="lookup"), 4), (dict(draft="auto"), 1.5), (dict(candidates=2), 4)], ids=str
)
def test_lookup_gains_on_repetitions_with_an_untuned_model(config, least):
    inputs = make_prompts(2)
    options = dict(do_sample=False, max_new_tokens=120, logits_processor=[Cycle()])
    expected = MODEL.generate(**inputs, **options)
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=8, **config))
    assert torch.equal(generator.generate(**inputs, **options), expected)
    assert generator.statistics.tokens_per_forward > least


class Alternate(LogitsProcessor):
    """After 30 31 ... 39, the tokens 10 11 ... 15 and 20 21 ... 25 follow by turns."""

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -100.0)
        for row, tokens in enumerate(input_ids.tolist()):
            last, turn = tokens[-1], tokens.count(39) % 2
            after = {39: 20 if turn else 10, 15: 30, 25: 30}
            scores[row, after.get(last, last + 1 if last in range(10, 39) else 30)] = 100.0
        return scores


def test_the_best_candidate_is_taken():
    """Whatever came last does not come now; what came before that does."""
    inputs = make_prompts(2)
    options = dict(do_sample=False, max_new_tokens=220, eos_token_id=None, logits_processor=[Alternate()])
    expected = MODEL.generate(**inputs, **options)
    runs = {}
    for candidates in (1, 2, 3):
        generator = JacobiGenerator(MODEL, JacobiConfig(draft="lookup", block_size=6, candidates=candidates))
        assert torch.equal(generator.generate(**inputs, **options), expected)
        runs[candidates] = generator.statistics
    assert runs[2].tokens_per_forward > runs[1].tokens_per_forward
    assert runs[1].chosen == () and len(runs[2].chosen) == 2 and len(runs[3].chosen) == 3
    assert runs[2].chosen[1] > 2
    forwards = sum(times for (source, _), times in runs[2].steps.items() if source == "lookup x 2")
    assert forwards <= sum(runs[2].chosen) <= 2 * forwards
    assert runs[2].steps.keys() <= {("lookup", 6), ("lookup x 2", 6)}


class StopsAt(StoppingCriteria):
    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores):
        return self.lengths == input_ids.shape[1]


@pytest.mark.parametrize("mode", ["window", "block"])
@pytest.mark.parametrize("lengths", [[31], [20, 31, 13]], ids=str)
def test_a_candidate_is_committed_as_a_window_is(lengths, mode, monkeypatch):
    """With its own scores and logits, up to where a criterion stops it, and streamed."""
    inputs = make_prompts(len(lengths), seed=2)
    options = dict(
        do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0, repetition_penalty=1.3,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    criteria = [StopsAt(lengths)]
    alone = JacobiGenerator(MODEL, JacobiConfig(draft="none")).generate(**inputs, **options, stopping_criteria=criteria)
    whole = MODEL.generate(**inputs, **options | dict(return_dict_in_generate=False))
    monkeypatch.setattr(
        loop, "LookupDrafts", functools.partial(Planted, expected=whole[:, 12:].tolist(), seed=len(lengths))
    )
    commits = []
    stream = dict(on_commit=commits.append) if len(lengths) == 1 else {}
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=7, candidates=3, mode=mode))
    got = generator.generate(**inputs, **options, **stream, stopping_criteria=criteria)
    assert sum(generator.statistics.chosen[1:]) > len(lengths)
    assert generator.statistics.tokens_per_forward > 1.5
    assert torch.equal(got.sequences, alone.sequences)
    assert [row.tokens for row in generator.statistics.rows] == [length - 12 for length in lengths]
    for name in ("scores", "logits"):
        mine, theirs = getattr(got, name), getattr(alone, name)
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if stream:
        assert sum(commits, []) == got.sequences[0, 12:].tolist()


@pytest.mark.parametrize("best", [[0, 0, 0], [2, 2, 2], [1, 0, 2]], ids=str)
def test_the_cache_takes_over_what_the_branch_wrote(best):
    """What is committed lies where one window alone would have written it; nothing else moves."""
    lengths, counts, width = [4, 0, 7], [3, 4, 1], 4
    cache = JacobiCache(torch.tensor(lengths, dtype=torch.int32), 24, backend="torch")
    keys, values = (torch.randn(3, 2, 12, size) for size in (5, 3))
    buffers = cache.update(keys, values, 0)
    before = [buffer.clone() for buffer in buffers]
    cache.take_branches(width, best, counts)
    for buffer, old, new in zip(buffers, before, (keys, values)):
        for row, (branch, count, length) in enumerate(zip(best, counts, lengths)):
            taken = new[row, :, branch * width + 1 : branch * width + count]
            assert torch.equal(buffer[row, :, length + 1 : length + count], taken)
            old[row, :, length + 1 : length + count] = taken
        assert torch.equal(buffer.nan_to_num(7.0), old.nan_to_num(7.0))


def test_several_blocks_are_in_flight():
    inputs = make_prompts(1)
    options = dict(do_sample=False, max_new_tokens=60, logits_processor=[Cycle()], eos_token_id=None)
    runs = {}
    for name, config in dict(one=dict(block_size=4), three=dict(block_size=4, blocks=3), wide=dict(block_size=12)).items():
        generator = JacobiGenerator(MODEL, JacobiConfig(draft="last", **config))
        runs[name] = generator.generate(**inputs, **options), generator.statistics
        assert torch.equal(runs[name][0], runs["one"][0])
    three, wide = runs["three"][1], runs["wide"][1]
    assert three.block_size == 12 and three.accept_histogram == wide.accept_histogram


def simulate(choice, rates, steps, seconds, noise=0.2):
    """rates: tokens of a step by (source, candidates, width); seconds: by its tokens. Returns how often each was used."""
    rng = random.Random(0)
    used = {}
    for _ in range(steps):
        arm = choice.next()
        used[arm] = used.get(arm, 0) + 1
        tokens = rates[arm]
        tokens = int(tokens) + (rng.random() < tokens % 1)
        choice.observe([tokens], seconds[arm[1] * arm[2]] * rng.uniform(1 - noise, 1 + noise))
    return used


SOURCES = (("context", 1), ("lookup", 1), ("context", 3))
RATES = {(*source, width): 1.03 for source in SOURCES for width in (16, 8, 4)} | {("context", 1, 1): 1}
SECONDS = {48: 2.4, 24: 1.6, 16: 1.4, 12: 1.3, 8: 1.2, 4: 1.1, 1: 1.0}


@pytest.mark.parametrize(
    ("fast", "expected"),
    [
        ({("context", 1, 16): 4.0, ("context", 1, 8): 2.8}, ("context", 1, 16)),
        ({("context", 1, 16): 4.0, ("context", 3, 16): 7.0}, ("context", 3, 16)),
        ({("lookup", 1, 8): 3.0, ("lookup", 1, 16): 3.1}, ("lookup", 1, 8)),
        ({}, ("context", 1, 1)),
    ],
)
def test_the_choice_is_the_fastest(fast, expected):
    used = simulate(AdaptiveChoice(16, SOURCES), RATES | fast, 2000, SECONDS)
    assert used[expected] > 1600


def test_the_choice_follows_the_text():
    choice = AdaptiveChoice(16, SOURCES)
    assert simulate(choice, RATES, 3000, SECONDS)["context", 1, 1] > 2500
    fast = {("lookup", 1, 16): 9.0, ("lookup", 1, 8): 5.0, ("lookup", 1, 4): 3.0}
    assert simulate(choice, RATES | fast, 6000, SECONDS)["lookup", 1, 16] > 1000


def test_what_was_learnt_stays_with_the_generator():
    generator = JacobiGenerator(MODEL, JacobiConfig(draft="auto", block_size=8))
    for seed in range(4):
        generator.generate(**make_prompts(1, seed=seed), do_sample=False, max_new_tokens=60, eos_token_id=None)
    steps = generator.statistics.steps
    assert sum(steps.values()) == generator.statistics.forwards
    # the trials of the seven choices are over
    assert len(steps) < 7
