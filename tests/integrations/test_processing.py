"""Logits processors, stopping criteria and scores act as they do under transformers' own greedy generate."""

from __future__ import annotations

import pytest
import torch
from helpers import EOS, VOCABULARY, make_model, make_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, StoppingCriteriaList

from cllm_kernels import JacobiConfig, JacobiGenerator
from cllm_kernels.decoding import Processing
from cllm_kernels.ops import JacobiState

MODEL = make_model("llama", seed=4)
MODEL.requires_grad_(False)
PROMPT = (  # of the bundled models
    "wine_1 : How many wines are there for each grape?\nselect count(*), grape from wine group by grape\n"
    "How many wines are there?\n"
)
NEW = 24
GREEDY = dict(do_sample=False, max_new_tokens=NEW)


class Rotate(LogitsProcessor):
    """Of a user: depends on the whole prefix and on the row's number."""

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0]
        shift = input_ids.sum(1) % 7 + torch.arange(len(scores))
        return scores + torch.stack([torch.linspace(0, 1, VOCABULARY).roll(int(s)) for s in shift]) * 2


class Counting(LogitsProcessor):
    """Remembers its calls."""

    stateful = True

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores.roll(len(self.lengths), dims=-1)


OPTIONS = {
    "repetition_penalty": dict(repetition_penalty=1.7),
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=2),
    "bad_words_ids": dict(bad_words_ids=[[t] for t in range(3, 30)] + [[40, 41]]),
    "sequence_bias": dict(sequence_bias={(t,): 3.0 for t in range(50, 60)} | {(50, 51): -9.0}),
    "min_new_tokens": dict(min_new_tokens=11, eos_token_id=[EOS, *range(3, 60)]),
    "min_length": dict(min_length=19, eos_token_id=[EOS, *range(3, 60)]),
    "suppress_tokens": dict(suppress_tokens=list(range(3, 50))),
    "begin_suppress_tokens": dict(begin_suppress_tokens=list(range(3, 80))),
    "forced_eos_token_id": dict(forced_eos_token_id=EOS),
    "forced_bos_token_id": dict(forced_bos_token_id=9),
    "exponential_decay": dict(exponential_decay_length_penalty=(4, 1.6)),
    "renormalize_logits": dict(renormalize_logits=True),
    "remove_invalid_values": dict(remove_invalid_values=True),
    "prefix_allowed_tokens_fn": dict(
        prefix_allowed_tokens_fn=lambda row, ids: [(int(ids[-1]) * 3 + row + k) % VOCABULARY for k in range(3)]
    ),
    "of a user": dict(logits_processor=[Rotate()]),
    "several": dict(
        repetition_penalty=1.3, min_new_tokens=6, suppress_tokens=[5, 6], logits_processor=[Rotate()],
        eos_token_id=[EOS, *range(3, 20)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["window", "block"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_processors(name, rows, mode):
    inputs, options = make_prompts(rows), OPTIONS[name]
    expected = MODEL.generate(**inputs, do_sample=False, max_new_tokens=NEW, **options)
    plain = MODEL.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    if name not in ("renormalize_logits", "remove_invalid_values", "forced_bos_token_id"):
        assert expected.tolist() != plain.tolist()  # it matters
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=6, mode=mode))
    assert torch.equal(generator.generate(**inputs, do_sample=False, max_new_tokens=NEW, **options), expected)
    run = generator.statistics
    assert run.processor_calls > 0 and 0 < run.processor_seconds < run.prefill_seconds + run.decode_seconds


def ties(scores):
    """Those that only float64 tells apart, and it alone prefers the last token."""
    return scores.round().double() + torch.arange(scores.shape[1]) * 1e-12


FORMS = {
    "float64": lambda ids, scores: ties(scores),
    "bfloat16": lambda ids, scores: scores.bfloat16(),
    "float16": lambda ids, scores: scores.half(),
    "integers": lambda ids, scores: (scores * 1e9).long(),
    "fewer columns": lambda ids, scores: scores[:, :40],
    "fewer columns now and then": lambda ids, scores: scores[:, : 30 + ids.shape[1] % 7],
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", FORMS)
def test_processors_may_return_scores_of_another_form(name, rows):
    inputs, options = make_prompts(rows), dict(max_new_tokens=NEW, logits_processor=[FORMS[name]])
    expected = MODEL.generate(**inputs, **options, do_sample=False)
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=6))
    assert torch.equal(generator.generate(**inputs, **options, do_sample=False), expected)
    options |= dict(do_sample=True, seed=3, top_k=0)  # top_k takes no integers
    assert torch.equal(generator.generate(**inputs, **options), generator.generate(**inputs, **options, draft="none"))


@pytest.mark.parametrize("form", [lambda s: s[0], lambda s: s[:0], lambda s: s[:, :0], lambda s: s.tile(2), lambda s: None])
def test_processors_that_return_no_scores(form):
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=6))
    with pytest.raises(ValueError, match=r"processors return .*; it must be scores \[1, at most 97\]"):
        generator.generate(**make_prompts(1), logits_processor=[lambda ids, scores: form(scores)], **GREEDY)
    assert "forward" not in MODEL.lm_head.__dict__


INVALID = {
    "of transformers": dict(remove_invalid_values=True, repetition_penalty=1.2),
    "of a user": dict(logits_processor=[lambda ids, scores: torch.nan_to_num(scores, nan=-5.0, posinf=5.0, neginf=-7.0)]),
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", INVALID)
def test_processors_may_take_out_what_is_no_number(name, value, rows):
    model, inputs, options = make_model("llama", seed=4), make_prompts(rows), INVALID[name]
    with torch.no_grad():
        model.lm_head.weight[7] = float(value)  # sums of which are NaN too
    expected = model.generate(**inputs, **options, **GREEDY)
    for config in (JacobiConfig(block_size=6), JacobiConfig(block_size=6, candidates=2)):
        assert torch.equal(JacobiGenerator(model, config).generate(**inputs, **options, **GREEDY), expected)


def test_processors_work_where_drafts_are_right():
    """A repetitive output under a processor of prefixes: several positions of a window are committed at once."""
    class Cycle(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[torch.arange(len(scores)), (input_ids[:, -1] + 1) % 5 + 10] = 100.0
            return scores

    inputs = make_prompts(3)
    options = dict(do_sample=False, max_new_tokens=30, logits_processor=[Cycle()])
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=6))
    assert torch.equal(generator.generate(**inputs, **options), MODEL.generate(**inputs, **options))
    assert generator.statistics.processor_calls < 30 * 6


def test_rows_of_different_lengths_are_processed_once():
    """Each call gets the whole batch as the model scored it, each row at its own length once."""
    prompt = torch.randint(3, VOCABULARY, (3, 5))
    state = JacobiState.create(prompt, limits=9, block_size=4)
    state.produced.copy_(torch.tensor([0, 2, 0]))
    logits = torch.randn(3, 4, VOCABULARY)
    seen = []

    class Narrow(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert scores.isfinite().all()
            seen.append(input_ids.shape[1])
            return scores.masked_fill(torch.arange(VOCABULARY) != input_ids[:, -1:], -torch.inf)

    scores = Processing([Narrow()], prompt, sampling=True)(logits, state)
    assert seen == [5, 7, 6, 8, 7, 9, 8, 10]
    assert (scores.isfinite().sum(-1) == 1).all()
    assert torch.equal(scores.argmax(-1)[:, 1:], state.window[:, 1:])


def test_stateful_processors_see_every_token_once_and_in_order():
    inputs = make_prompts(2)
    expected, got = Counting(), Counting()
    options = dict(do_sample=False, max_new_tokens=9, eos_token_id=None)
    want = MODEL.generate(**inputs, **options, logits_processor=[expected])
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=6))
    assert torch.equal(generator.generate(**inputs, **options, logits_processor=[got]), want)
    assert got.lengths == expected.lengths
    assert generator.statistics.draft == "none" and generator.statistics.block_size == 1


def test_no_drafts_is_one_token_at_a_time():
    inputs = make_prompts(3)
    options = dict(do_sample=False, max_new_tokens=NEW)
    generator = JacobiGenerator(MODEL, JacobiConfig(draft="none"))
    assert torch.equal(generator.generate(**inputs, **options), MODEL.generate(**inputs, **options))
    assert generator.statistics.tokens_per_forward == 1


def stop_at(total, rows=None):
    """Stops where the sum of the last three tokens is a multiple of `total`."""
    asked = []

    def criterion(input_ids, scores, **kwargs):
        asked.append(input_ids.shape[1])
        return input_ids[:, -3:].sum(1) % total == 0

    criterion.asked = asked
    return criterion


@pytest.mark.parametrize("mode", ["window", "block"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("total", [2, 7, 19])
def test_criteria_never_overshoot(total, rows, mode):
    inputs = make_prompts(rows, seed=total)
    expected_criterion, criterion = stop_at(total), stop_at(total)
    options = dict(do_sample=False, max_new_tokens=40)
    expected = MODEL.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([expected_criterion]))
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=7, mode=mode))
    got = generator.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([criterion]))
    assert torch.equal(got, expected)
    if rows == 1:
        assert criterion.asked == expected_criterion.asked
    for row in generator.statistics.rows:
        assert sum(length * count for length, count in enumerate(row.accept_histogram)) == row.tokens
        assert sum(row.accept_histogram) == row.iterations
    assert any(row.stopped_by == "criterion" for row in generator.statistics.rows) or total == 19


def test_criteria_inside_an_accepted_run():
    """The bundled CLLM commits several tokens at once; the criterion ends the output in the middle of them."""
    model = AutoModelForCausalLM.from_pretrained("models/spider-cllm", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained("models/spider-cllm")
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    options = dict(do_sample=False, max_new_tokens=40)
    whole = model.generate(**inputs, **options)[0]
    for count in range(1, len(whole) - inputs["input_ids"].shape[1]):
        wanted = inputs["input_ids"].shape[1] + count
        criteria = StoppingCriteriaList([lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= wanted)])
        commits = []
        generator = JacobiGenerator(model)
        got = generator.generate(**inputs, **options, stopping_criteria=criteria, on_commit=commits.extend)
        assert got[0].tolist() == whole[:wanted].tolist()
        assert commits == got[0, inputs["input_ids"].shape[1] :].tolist()
        run = generator.statistics
        assert run.rows[0].stopped_by == "criterion" and run.tokens == count
        assert sum(length * times for length, times in enumerate(run.accept_histogram)) == count


def test_stop_strings():
    model = AutoModelForCausalLM.from_pretrained("models/spider-cllm", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained("models/spider-cllm")
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    options = dict(do_sample=False, max_new_tokens=40, stop_strings=["from"], tokenizer=tokenizer)
    expected = model.generate(**inputs, **options)
    assert expected.shape[1] < model.generate(**inputs, do_sample=False, max_new_tokens=40).shape[1]
    assert torch.equal(JacobiGenerator(model).generate(**inputs, **options), expected)
    del options["stop_strings"]
    model.generation_config.stop_strings = ["from"]
    assert torch.equal(JacobiGenerator(model).generate(**inputs, **options), expected)
    assert model.generation_config.stop_strings == ["from"]
    model.generation_config.stop_strings = None
    config = GenerationConfig(max_new_tokens=40, stop_strings=["from"])
    options = dict(generation_config=config, tokenizer=tokenizer)
    assert torch.equal(JacobiGenerator(model).generate(**inputs, **options), expected)


def test_max_time_ends_soon():
    generator = JacobiGenerator(MODEL, JacobiConfig(draft="none"))
    generator.generate(**make_prompts(1), do_sample=False, max_new_tokens=200, max_time=0.0, eos_token_id=None)
    assert generator.statistics.tokens == 1 and generator.statistics.rows[0].stopped_by == "criterion"


@pytest.mark.parametrize("rows", [1, 3])
def test_scores_and_logits_are_shaped_as_generates(rows):
    inputs = make_prompts(rows)
    options = dict(
        do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True, output_scores=True, output_logits=True,
        repetition_penalty=1.3, eos_token_id=[EOS, *range(3, 12)],
    )  # fmt: skip
    expected = MODEL.generate(**inputs, **options)
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=6))
    got = generator.generate(**inputs, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(got[name]) == len(expected[name])
        for t, (mine, theirs) in enumerate(zip(got[name], expected[name], strict=True)):
            assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
            for row, count in enumerate(row.tokens for row in generator.statistics.rows):
                if t < count:
                    assert torch.allclose(mine[row], theirs[row], atol=1e-4)
                else:
                    assert not mine[row].any()
    assert JacobiGenerator(MODEL).generate(**inputs, **options | {"output_scores": False}).scores is None
