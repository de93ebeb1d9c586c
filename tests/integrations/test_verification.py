"""Certificates: right outputs pass, wrong tokens are found."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from families import EXACT, make_family
from helpers import EOS, PAD, VOCABULARY, make_model, make_prompts
from test_processing import Counting
from test_processing import OPTIONS as PROCESSORS
from test_sampling import WARPERS
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cllm_kernels import JacobiConfig, JacobiGenerator, verify
from cllm_kernels.integrations import attention as attention_module
from cllm_kernels.integrations import verification

MODEL = make_model("llama", seed=4)
NEW = 24


def decode(model, inputs, rows_end=False, **options):
    if rows_end:
        options["eos_token_id"] = [EOS, *range(3, 12)]
    return JacobiGenerator(model, JacobiConfig(block_size=6)).generate(**inputs, max_new_tokens=NEW, **options), options


def length(row):
    """New tokens up to the first EOS."""
    return row.index(EOS) + 1 if EOS in row else len(row)


def planted(output, row, position, seed=0):
    wrong = output.clone()
    wrong[row, 12 + position] = (wrong[row, 12 + position] + 7 + seed % 80) % VOCABULARY
    return wrong


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Mistral", "GPT-2", "gpt-oss", "DeepSeek-V3", "GPT-J"])
def test_greedy_outputs_are_exact(name, rows):
    model, inputs = make_family(name), make_prompts(rows)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    for output in (expected, decode(model, inputs, do_sample=False)[0]):
        certificate = verify(model, **inputs, output=output, do_sample=False)
        assert certificate.exact and certificate.lossless and certificate.forwards == 1, certificate
        assert list(certificate.tokens) == [length(row) for row in output[:, 12:].tolist()]


@pytest.mark.parametrize("name", PROCESSORS)
def test_with_processors(name):
    inputs = make_prompts(4)
    output, options = decode(MODEL, inputs, do_sample=False, **PROCESSORS[name])
    certificate = verify(MODEL, **inputs, output=output, max_new_tokens=NEW, **options)
    assert certificate.exact, certificate
    if not isinstance(options.get("eos_token_id"), list):
        assert list(certificate.tokens) == [length(row) for row in output[:, 12:].tolist()]


def test_with_a_processor_that_remembers():
    inputs = make_prompts(2)
    output = decode(MODEL, inputs, do_sample=False, logits_processor=[Counting()])[0]
    assert verify(MODEL, **inputs, output=output, logits_processor=[Counting()]).exact
    assert not verify(MODEL, **inputs, output=planted(output, 0, 3), logits_processor=[Counting()]).lossless


@pytest.mark.parametrize("rows_end", [False, True])
@pytest.mark.parametrize("name", WARPERS)
def test_sampled_outputs_are_exact_for_their_seed_alone(name, rows_end):
    inputs = make_prompts(3)
    options = dict(do_sample=True, seed=5) | WARPERS[name]
    output, options = decode(MODEL, inputs, rows_end, **options)
    certificate = verify(MODEL, **inputs, output=output, **options)
    assert certificate.exact, certificate
    if rows_end:
        assert min(certificate.tokens) < NEW
    other = verify(MODEL, **inputs, output=output, **options | {"seed": 6})
    assert not other.lossless and len(other.mismatches) > 10


def test_seeds_of_rows_and_return_sequences():
    inputs, options = make_prompts(2), dict(do_sample=True, top_k=0, num_return_sequences=3, seed=[1, 2, 3, 4, 5, 6])
    output, _ = decode(MODEL, inputs, return_dict_in_generate=True, **options)
    many = {name: value.repeat_interleave(3, 0) for name, value in inputs.items()}
    options.pop("num_return_sequences")
    assert verify(MODEL, **many, output=output, **options).exact


@pytest.mark.parametrize("sampling", [False, True])
def test_a_planted_token_is_found(sampling):
    """At every position, also those behind other wrong tokens; the tokens before it stay right."""
    inputs = make_prompts(3, seed=2)
    options = dict(do_sample=True, seed=3, top_k=0) if sampling else dict(do_sample=False)
    output, _ = decode(MODEL, inputs, eos_token_id=None, **options)
    for position in range(NEW):
        row = position % 3
        wrong = planted(output, row, position, seed=position)
        certificate = verify(MODEL, **inputs, output=wrong, eos_token_id=None, **options)
        assert not certificate.exact and not certificate.lossless
        first = certificate.mismatches[0]
        assert (first.row, first.position) == (row, position)
        assert first.token == int(wrong[row, 12 + position])
        assert first.expected == int(output[row, 12 + position])
        assert first.gap > 10 * first.rounding and not first.near_tie
        assert {mismatch.row for mismatch in certificate.mismatches} == {row}
        assert certificate.forwards > 1 and "NOT lossless" in str(certificate)


def test_a_token_that_a_processor_rules_out_is_found():
    inputs = make_prompts(1)
    output, options = decode(MODEL, inputs, do_sample=False, suppress_tokens=list(range(3, 50)))
    wrong = output.clone()
    wrong[0, 12 + 9] = 20
    first = verify(MODEL, **inputs, output=wrong, **options).mismatches[0]
    assert first.position == 9 and math.isinf(first.gap) and not first.near_tie


def test_behind_the_end_there_is_padding():
    inputs = make_prompts(4, seed=4)
    output, options = decode(MODEL, inputs, True, do_sample=False)
    certificate = verify(MODEL, **inputs, output=output, **options)
    assert certificate.exact
    row = certificate.tokens.index(min(certificate.tokens))
    assert certificate.tokens[row] < output.shape[1] - 12, "no row has ended early"
    wrong = output.clone()
    wrong[row, -1] = 50
    (mismatch,) = verify(MODEL, **inputs, output=wrong, **options).mismatches
    assert (mismatch.row, mismatch.token, mismatch.expected) == (row, 50, PAD) and not mismatch.near_tie


def test_rows_that_a_criterion_ended():
    inputs = make_prompts(4, seed=7)
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=6))
    output = generator.generate(
        **inputs, do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True,
        stopping_criteria=[lambda ids, scores: ids[:, -3:].sum(1) % 7 == 0],
    )  # fmt: skip
    lengths = [row.tokens for row in generator.statistics.rows]
    assert len(set(lengths)) > 1
    certificate = verify(MODEL, **inputs, output=output)
    assert certificate.exact and list(certificate.tokens) == lengths
    assert verify(MODEL, **inputs, output=output.sequences, lengths=lengths).exact


def test_half_precision_differs_by_near_ties_alone():
    """bf16 forwards of different widths round differently: some tokens are no argmax of the other forward."""
    model = make_model("qwen2", seed=1, dtype=torch.bfloat16)
    found = 0
    for seed in range(4):
        inputs = make_prompts(4, seed=seed)
        output, _ = decode(model, inputs, do_sample=True, seed=seed, top_k=0, eos_token_id=None)
        certificate = verify(model, **inputs, output=output, do_sample=True, seed=seed, top_k=0, eos_token_id=None)
        assert certificate.lossless, certificate
        found += certificate.near_ties
        greedy, _ = decode(model, inputs, do_sample=False, eos_token_id=None)
        certificate = verify(model, **inputs, output=greedy, eos_token_id=None)
        assert certificate.lossless, certificate
        found += certificate.near_ties
        wrong = verify(model, **inputs, output=planted(greedy, 1, 11), eos_token_id=None)
        assert not wrong.lossless
    assert found, "nothing near a tie: this test shows little"


def test_random_outputs_are_refused():
    """Every position is judged on its own account."""
    generator = random.Random(0)
    inputs = make_prompts(2)
    new = torch.tensor([[generator.randrange(3, VOCABULARY) for _ in range(NEW)] for _ in range(2)])
    certificate = verify(MODEL, **inputs, output=torch.cat((inputs["input_ids"], new), 1), eos_token_id=None)
    assert len(certificate.mismatches) > 40 and certificate.near_ties == 0


def test_the_model_is_left_as_it_was():
    model, inputs = make_model("llama", seed=4), make_prompts(1)
    output, _ = decode(model, inputs, do_sample=False)
    model.train()
    model.generation_config.stop_strings = ["x"]
    before = (model.config._attn_implementation, model.generation_config)
    assert verify(model, **inputs, output=output).exact
    assert not verify(model, **inputs, output=planted(output, 0, 3)).exact
    assert (model.config._attn_implementation, model.generation_config) == before and model.training


BAD = {
    "list": (lambda x: [1, 2], {}, "output is list"),
    "dtype": (lambda x: x.float(), {}, "output is torch.float32"),
    "rank": (lambda x: x[0], {}, "int64 tensor"),
    "rows": (lambda x: x[:1], {}, r"must be \[2, 12 \+ new tokens\]"),
    "shorter than the prompt": (lambda x: x[:, :5], {}, r"must be \[2, 12 \+ new tokens\]"),
    "prompt alone": (lambda x: x[:, :12], {"max_new_tokens": 3}, "no new tokens"),
    "prompt alone, no limit": (lambda x: x[:, :12], {}, "no new tokens"),
    "another prompt": (lambda x: x.roll(1, 0), {}, "does not begin with the prompt"),
    "vocabulary": (lambda x: x.index_fill(1, torch.tensor([15]), 97), {}, "token 97"),
    "negative": (lambda x: x.index_fill(1, torch.tensor([15]), -3), {}, "token -3"),
    "seed": (lambda x: x, {"do_sample": True}, "pass seed="),
    "generator": (lambda x: x, {"generator": torch.Generator()}, "generator"),
    "length": (lambda x: x, {"max_new_tokens": 5}, "24 new tokens; the options allow 5"),
    "lengths": (lambda x: x, {"lengths": [3, 99]}, r"lengths is \[3, 99\]"),
    "seeds": (lambda x: x, {"do_sample": True, "seed": [1, 2, 3]}, "3 seeds for 2 rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, options, message = BAD[case]
    inputs = make_prompts(2)
    output = MODEL.generate(**inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=None)
    with pytest.raises(ValueError, match=message):
        verify(MODEL, **inputs, output=change(output), **options)


def test_mismatches_name_what_the_whole_forward_gives():
    """As the argmax; the gap is that of float64."""
    model = make_model("llama", seed=4, dtype=torch.bfloat16)
    inputs = make_prompts(1)
    output, options = decode(model, inputs, eos_token_id=None)
    wrong = planted(output, 0, 5)
    certificate = verify(model, **inputs, output=wrong, max_new_tokens=NEW, **options)
    mask = torch.cat((inputs["attention_mask"], torch.ones(1, NEW, dtype=torch.int64)), 1)[:, :-1]
    forward = dict(input_ids=wrong[:, :-1], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    with torch.no_grad():
        logits = model(**forward).logits[:, 11:].double()
        exact = copy.deepcopy(model).double()(**forward).logits[:, 11:]
    assert certificate.mismatches
    for mismatch in certificate.mismatches:
        at = mismatch.row, mismatch.position
        assert mismatch.expected == int(logits[at].argmax()) != mismatch.token
        assert mismatch.gap == pytest.approx(float(exact[at].max() - exact[at][mismatch.token]), rel=1e-4)
        error = logits[at] - exact[at]
        assert mismatch.rounding == pytest.approx(float(error.max() - error.min()), rel=1e-2)


@pytest.mark.parametrize("name", EXACT)
def test_every_family_computes_in_float64(name):
    """As a copy in float64 does (but for what models compute in float32 in any dtype), and is as it was after it."""
    model = make_family(name).bfloat16()
    inputs = make_prompts(1)
    before = {name: (buffer.dtype, buffer.data_ptr()) for name, buffer in model.named_buffers()}
    implementations = (model.config._attn_implementation, model.config._experts_implementation)
    with verification._in_float64(model):
        exact = model(**inputs).logits
    assert exact.dtype == torch.float64
    assert implementations == (model.config._attn_implementation, model.config._experts_implementation)
    assert before == {name: (buffer.dtype, buffer.data_ptr()) for name, buffer in model.named_buffers()}
    with torch.no_grad():
        model.set_experts_implementation("eager")
        wide = copy.deepcopy(model).double()(**inputs).logits
    assert float((exact - wide).abs().max()) < 1e-4


def corrupt(kind):
    """The window's attention with an error that a kernel may have."""
    attention = attention_module._attention

    def wrong(backend, module, query, key, value, attention_mask=None, scaling=None, **options):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if kind == "scale":
            scaling *= 1.5
        else:  # the newest key of the cache is not seen
            lengths = attention_module.from_mask(attention_mask)[0]
            key = key.clone()
            for row, length in enumerate(lengths.tolist()):
                key[row, :, max(0, length - 1)] = -100 * query[row].mean((0, 1))
        return attention(backend, module, query, key, value, attention_mask, scaling=scaling, **options)

    return wrong


def test_experts_that_tie_are_no_error():
    """One forward need not jump as another honest one does; several do."""
    options = dict(eos_token_id=None, max_new_tokens=48)
    forwards = []
    for name in ("DeepSeek-V3", "gpt-oss", "Mixtral", "Qwen2-MoE", "Qwen3-MoE"):
        model = make_family(name).bfloat16()
        generator = JacobiGenerator(model)
        for seed in range(6):
            inputs = make_prompts(4, 12, seed=seed)
            for way in (dict(do_sample=False), dict(do_sample=True, top_k=0, seed=5)):
                output = generator.generate(**inputs, **options, **way)
                certificate = verify(model, **inputs, output=output, **options, **way)
                assert certificate.lossless, f"{name}: {certificate}"
                forwards.append(certificate.forwards)
    assert 10 in forwards, "one forward explained all: this test shows little"


@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["scale", "key"])
def test_an_error_of_the_packages_attention_is_found(kind, dtype, name, monkeypatch):
    """It gives the same wrong tokens again when verify runs; they are no near-ties for that."""
    model = make_family(name).to(dtype)
    inputs = make_prompts(2)
    options = dict(do_sample=False, eos_token_id=None, max_new_tokens=NEW)
    right = JacobiGenerator(model).generate(**inputs, **options)
    monkeypatch.setattr(attention_module, "_attention", corrupt(kind))
    output = JacobiGenerator(model).generate(**inputs, **options, optimize=False)
    assert not torch.equal(output, right), "the error changes nothing: this test shows little"
    assert verify(model, **inputs, output=right, **options).lossless
    certificate = verify(model, **inputs, output=output, **options)
    assert not certificate.lossless
    assert all(mismatch.gap > mismatch.rounding for mismatch in certificate.mismatches if not mismatch.near_tie)


# Warper, probabilities of which it keeps some, token, and whether its way over or under the cutoff is within rounding.
CUTOFFS = {
    "top-k, ruled out": (TopKLogitsWarper(2), (0.5, 0.20, 0.19, 0.11), 2, True),
    "top-k, far out": (TopKLogitsWarper(2), (0.5, 0.22, 0.17, 0.11), 2, False),
    "top-k, let in": (TopKLogitsWarper(2), (0.5, 0.20, 0.19, 0.11), 0, True),
    "top-k, far in": (TopKLogitsWarper(2), (0.5, 0.22, 0.17, 0.11), 0, False),
    "top-p, ruled out": (TopPLogitsWarper(0.7), (0.705, 0.2, 0.05, 0.045), 1, True),
    "top-p, far out": (TopPLogitsWarper(0.7), (0.8, 0.1, 0.05, 0.05), 1, False),
    "top-p, let in": (TopPLogitsWarper(0.7), (0.695, 0.2, 0.06, 0.045), 0, True),
    "top-p, far in": (TopPLogitsWarper(0.7), (0.5, 0.4, 0.06, 0.04), 0, False),
    "min-p, ruled out": (MinPLogitsWarper(0.3), (0.6, 0.175, 0.125, 0.1), 1, True),
    "min-p, far out": (MinPLogitsWarper(0.3), (0.6, 0.15, 0.13, 0.12), 1, False),
    "min-p, let in": (MinPLogitsWarper(0.3), (0.6, 0.185, 0.115, 0.1), 0, True),
    "min-p, far in": (MinPLogitsWarper(0.3), (0.6, 0.3, 0.05, 0.05), 0, False),
}


@pytest.mark.parametrize("case", CUTOFFS)
def test_at_a_cutoff_rounding_decides_too(case):
    """Noise favours a token, so that it stands in the output although ruled out, or is let in and does not stand there.
    It is a near-tie if rounding can put it to the other side of the cutoff."""
    warper, probabilities, token, near_tie = CUTOFFS[case]
    exact = torch.tensor(probabilities, dtype=torch.float64).log()[None, None]
    logits = exact + torch.tensor([0.0, 0.06, -0.04, 0.0])  # a range of 0.1
    noise = 5 * (torch.arange(4) == (token or 1))

    def judge(values):
        return warper(None, values[0].float())[None] + noise

    new, expected = torch.tensor([[token]]), judge(exact).argmax(-1)
    (found,) = verification._mismatches(
        new, expected, new != expected, verification._moved(logits, exact), exact, judge
    )
    assert (found.token, found.expected) == (token, int(expected)) and found.rounding == pytest.approx(0.1, abs=1e-5)
    assert found.gap > found.rounding and found.near_tie == near_tie
    assert ("near-tie at a cutoff" if near_tie else "wrong") in str(found)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_k": 0, "top_p": 0.5}, {"top_k": 0, "min_p": 0.3}])
def test_half_precision_at_cutoffs(options):
    model = make_family("Llama").bfloat16()
    options = dict(do_sample=True, eos_token_id=None) | options
    found = 0
    for seed in range(16):
        inputs = make_prompts(4, seed=seed)
        output, _ = decode(model, inputs, seed=seed, **options)
        certificate = verify(model, **inputs, output=output, seed=seed, **options)
        assert certificate.lossless, certificate
        found += sum(mismatch.gap > mismatch.rounding for mismatch in certificate.mismatches)
    assert found, "nothing at a cutoff: this test shows little"
