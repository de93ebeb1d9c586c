"""Rows that have ended leave the batch, rows that wait take their places, and nothing that is kept by rows mixes them up."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from helpers import Planted, make_model, make_prompts

from cllm_kernels import JacobiConfig, JacobiGenerator
from cllm_kernels.decoding import JacobiCache, Session, loop
from cllm_kernels.integrations import generate
from cllm_kernels.ops import JacobiState

MODEL = make_model("llama", seed=4)
ROWS, WIDTH = 6, 12
INPUTS = make_prompts(ROWS, WIDTH, seed=6)
SEEDS = tuple(range(3, 3 + ROWS))
# They end after 90 (by the length), 44, 58, 2, 12 and 22 tokens.
OPTIONS = dict(do_sample=False, max_new_tokens=90, eos_token_id=[72, 29, 80], pad_token_id=0)
CONFIGS = {
    "context": dict(),
    "block": dict(mode="block"),
    "lookup": dict(draft="lookup"),
    "candidates": dict(candidates=3),
    "lookup, candidates": dict(draft="lookup", candidates=3),
    "block, candidates": dict(mode="block", candidates=2),
    "adaptive": dict(adaptive=True),
    "auto": dict(draft="auto"),
    "auto, candidates": dict(draft="auto", candidates=3),
}


def alone(row):
    pads = int((INPUTS["attention_mask"][row] == 0).sum())
    return {name: values[row : row + 1, pads:] for name, values in INPUTS.items()}


@pytest.fixture
def batches():
    """The rows of every forward."""
    seen = []
    hook = MODEL.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    yield seen
    hook.remove()


@pytest.fixture
def sessions(monkeypatch):
    """The sessions of all decodes."""
    seen, decode = [], generate.decode
    monkeypatch.setattr(generate, "decode", lambda session, *rest, **options: seen.append(session) or decode(
        session, *rest, **options))  # fmt: skip
    return seen


@pytest.fixture
def planted(monkeypatch):
    """Candidates that are right for a while, so that branches of all rows are taken."""

    def plant(sequences):
        make = functools.partial(Planted, expected=sequences[:, WIDTH:].tolist(), seed=1)
        monkeypatch.setattr(loop, "LookupDrafts", make)

    return plant


def check_that_they_left(batches, statistics):
    assert len(batches) == statistics.forwards
    tokens = [row.tokens for row in statistics.rows]
    assert tokens == [90, 44, 58, 2, 12, 22]
    assert {row.stopped_by for row in statistics.rows} == {"eos", "length"}
    # each forward has the rows that had not ended before it
    running = [sum(row.iterations > turn for row in statistics.rows) for turn in range(statistics.forwards)]
    assert batches == running and running[-1] < running[0] == ROWS


@pytest.mark.parametrize("guesses", ["own", "planted"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_stay_and_rows_leave(name, guesses, batches, planted):
    config = JacobiConfig(block_size=6, seed=SEEDS, **CONFIGS[name])
    expected = MODEL.generate(**INPUTS, **OPTIONS)
    if guesses == "planted":
        planted(torch.nn.functional.pad(expected, (0, 90)))
    generator = JacobiGenerator(MODEL, config)
    batches.clear()
    got = generator.generate(**INPUTS, **OPTIONS)
    assert torch.equal(got, expected)
    check_that_they_left(batches, generator.statistics)
    if config.candidates > 1 and guesses == "planted":
        assert sum(generator.statistics.chosen[1:]) > 0
    if config.adapts or guesses == "planted":
        return
    # what each row keeps (its drafts, its seed, its pool, its counts) is what it has alone
    for row, together in enumerate(generator.statistics.rows):
        single = JacobiGenerator(MODEL, JacobiConfig(block_size=6, seed=SEEDS[row : row + 1], **CONFIGS[name]))
        single.generate(**alone(row), **OPTIONS)
        assert single.statistics.rows == (together,)


@pytest.mark.parametrize("most", [1, 2, 4, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_waiting_rows_take_the_places_of_others(name, most, batches, sessions):
    config = JacobiConfig(block_size=6, seed=SEEDS, max_batch_size=most, **CONFIGS[name])
    expected = MODEL.generate(**INPUTS, **OPTIONS)
    generator = JacobiGenerator(MODEL, config)
    batches.clear()
    assert torch.equal(generator.generate(**INPUTS, **OPTIONS), expected)
    run = generator.statistics
    assert max(batches) == most and len(batches) == run.forwards
    assert sum(batches) == run.iterations  # no forward has rows that have ended, or that wait
    assert all(keys.shape[0] == values.shape[0] == most for keys, values in sessions[0].cache._buffers.values())
    # the first group, then a group each time that half of the places are free, or enough for all who wait
    least, largest = (math.ceil((ROWS - most) / places) for places in (most, (most + 1) // 2))
    assert 0 < least <= run.prefill_forwards - 1 <= largest
    assert run.prefill_seconds > 0 and run.decode_seconds > 0
    if config.adapts:
        return
    for row, together in enumerate(run.rows):
        single = JacobiGenerator(MODEL, JacobiConfig(block_size=6, seed=SEEDS[row : row + 1], **CONFIGS[name]))
        single.generate(**alone(row), **OPTIONS)
        assert single.statistics.rows == (together,)


def test_padding_of_all_rows_that_get_their_prompts_is_not_read():
    """A short prompt beside long ones that have ended costs what it costs alone."""
    inputs = {name: values[:2] for name, values in INPUTS.items()}
    pads = (inputs["attention_mask"] == 0).sum(1)
    widths = []
    hook = MODEL.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        for order in ([0, 1], [1, 0]):
            widths.clear()
            generator = JacobiGenerator(MODEL, JacobiConfig(block_size=6, max_batch_size=1))
            rows = {name: values[order] for name, values in inputs.items()}
            got = generator.generate(**rows, **OPTIONS)
            assert [width for width in widths if width > 6] == [WIDTH - 1 - int(pads[row]) + 6 for row in order]
            assert torch.equal(got, MODEL.generate(**rows, **OPTIONS))
    finally:
        hook.remove()
    assert pads.min() == 0 < pads.max()


@pytest.mark.parametrize("most", [None, 1, 4])
@pytest.mark.parametrize("name", ["context", "block", "lookup"])
def test_trajectories_are_those_of_rows_that_left(name, most, batches):
    config = JacobiConfig(block_size=6, seed=SEEDS, record_trajectory=True, max_batch_size=most, **CONFIGS[name])
    together = JacobiGenerator(MODEL, config)
    together.generate(**INPUTS, **OPTIONS)
    if most is None:
        check_that_they_left(batches, together.statistics)
    for row, states in enumerate(together.trajectory):
        single = JacobiGenerator(MODEL, dataclasses.replace(config, seed=SEEDS[row : row + 1], max_batch_size=None))
        single.generate(**alone(row), **OPTIONS)
        assert single.trajectory == [states]


def test_choices_are_learnt_by_the_number_of_rows():
    """Steps with few rows cost less, so what pays is another width."""
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=6, adaptive=True))
    for _ in range(2):
        generator.generate(**INPUTS, **OPTIONS)
        ((_, choices),) = (item for item in generator._memory.items() if item[0][0] == "choices")
        assert sorted(choices) == [1, 2, 4, 8]  # of the 6 rows, two and then one leave at a time
    assert all(arm.seconds > 0 for choice in choices.values() for arm in choice.arms[:1])


@pytest.mark.parametrize("processors", [{}, dict(temperature=1.5), dict(top_k=20, top_p=0.9, min_new_tokens=2)], ids=str)
@pytest.mark.parametrize("most", [None, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_samples_stay_and_rows_leave(name, most, processors, batches):
    options = OPTIONS | dict(do_sample=True, **dict(dict(top_k=0), **processors))
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=5, seed=SEEDS, max_batch_size=most, **CONFIGS[name]))
    got = generator.generate(**INPUTS, **options)
    assert max(batches) == (most or ROWS) and batches[-1] < ROWS
    assert sum(batches) == sum(row.iterations for row in generator.statistics.rows)
    ones = JacobiGenerator(MODEL, JacobiConfig(draft="none"))
    for row in range(ROWS):
        expected = ones.generate(**alone(row), **options, seed=SEEDS[row : row + 1])
        new = expected[0, -ones.statistics.rows[0].tokens :].tolist()
        assert got[row, WIDTH : WIDTH + len(new)].tolist() == new
        assert (got[row, WIDTH + len(new) :] == 0).all()


def test_rows_stay_where_others_know_them_by_number(batches):
    """Processors and criteria may; scores are those of all rows."""
    for kept in (
        dict(repetition_penalty=1.1), dict(output_scores=True, return_dict_in_generate=True), dict(max_time=60.0),
    ):  # fmt: skip
        for draft in ("context", "lookup"):
            JacobiGenerator(MODEL, JacobiConfig(block_size=6, draft=draft)).generate(**INPUTS, **OPTIONS, **kept)
    assert set(batches) == {ROWS}


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("row", [0, 2, 5])
def test_nan_logits_name_the_row_of_the_batch(row, candidates, backend, sessions, planted):
    """Also where rows have left, and among candidates."""
    planted(torch.nn.functional.pad(MODEL.generate(**INPUTS, **OPTIONS | dict(eos_token_id=None)), (0, 90)))
    size, poisoned = 6, []

    def poison(module, args, output):
        rows = output.logits.shape[0]
        order = sessions[0].order[:rows]
        if order != list(range(rows)) and row in order:
            output.logits[order.index(row), (candidates - 1) * size + 2, 5] = float("nan")
            poisoned.append(rows)

    hook = MODEL.register_forward_hook(poison)
    try:
        with pytest.raises(ValueError, match=f"logits of row {row} at window position 2 hold NaN"):
            config = JacobiConfig(block_size=size, draft="lookup", candidates=candidates, backend=backend)
            JacobiGenerator(MODEL, config).generate(**INPUTS, **OPTIONS)
    finally:
        hook.remove()
    assert len(poisoned) == 1 and poisoned[0] < ROWS


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_nan_logits_name_a_row_that_waited(backend):
    """Row 4 waits until row 3 has ended, and stands before the others then."""
    prompts = []

    def poison(module, args, kwargs, output):
        if kwargs["input_ids"].shape[1] > 6:
            prompts.append(output.logits.shape[0])
            if len(prompts) == 2:
                output.logits[0, 2, 5] = float("nan")

    hook = MODEL.register_forward_hook(poison, with_kwargs=True)
    try:
        with pytest.raises(ValueError, match="logits of row 4 at window position 2 hold NaN"):
            config = JacobiConfig(block_size=6, draft="lookup", max_batch_size=4, backend=backend)
            JacobiGenerator(MODEL, config).generate(**INPUTS, **OPTIONS)
    finally:
        hook.remove()
    assert prompts[0] == 4


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (dict(repetition_penalty=1.1), "logits processors"),
        (dict(max_time=60.0), "stopping criteria"),
        (dict(output_scores=True, return_dict_in_generate=True), "output_scores"),
        (dict(output_logits=True, return_dict_in_generate=True), "output_logits"),
    ],
    ids=str,
)
def test_rows_do_not_wait_where_others_know_them_by_number(options, what, batches):
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=6, max_batch_size=4))
    with pytest.raises(NotImplementedError, match=f"max_batch_size=4 .*{what}.* pass max_batch_size=None"):
        generator.generate(**INPUTS, **OPTIONS, **options)
    assert not batches
    few = {name: values[:4] for name, values in INPUTS.items()}
    generator.generate(**few, **OPTIONS, **options)
    assert set(batches) == {4}


def test_branches_of_the_first_rows():
    cache = JacobiCache(torch.tensor([4, 2, 9], dtype=torch.int32), 24, backend="torch")
    keys = torch.randn(3, 1, 8, 4)
    buffer, _ = cache.update(keys, keys, 0)
    cache.take_branches(4, [0, 1], [2, 3])
    assert torch.equal(buffer[1, :, 3:5], keys[1, :, 5:7]) and torch.equal(buffer[2, :, 9:17], keys[2])


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_rows_change_places_in_all_that_is_kept_by_rows(backend, monkeypatch):
    monkeypatch.setenv("CLLM_BACKEND", backend)
    state = JacobiState.allocate(5, 3, 7, 4, 2)
    for index, tensor in enumerate(state.tensors()):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 100 * index)
    bounds, other = torch.arange(10, dtype=torch.int32).view(2, 5), torch.randn(5, 6)
    state.lengths.set_(bounds[0])
    before = [tensor.clone() for tensor in (*state.tensors(), bounds[1], other)]
    session = Session(None, state, bounds)
    session._exchange([0, 3], [4, 1], [other])
    order = [4, 3, 2, 1, 0]
    assert session.order == order
    for old, new in zip(before, (*state.tensors(), bounds[1], other), strict=True):
        assert torch.equal(new, old[order] if old.shape[0] == 5 else old)
