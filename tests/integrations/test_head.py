"""Decoding without logits: where it is done, that nothing else changes, and where logits are made as before."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from families import make_family
from helpers import FAMILIES, VOCABULARY, make_model, make_prompts
from torch import nn
from transformers import LlamaForCausalLM, LogitsProcessor, StoppingCriteria

from cllm_kernels import JacobiConfig, JacobiGenerator, backends
from cllm_kernels.decoding import Predictions
from cllm_kernels.integrations import generate as module_under_test
from cllm_kernels.integrations import head as head_module

KNOWN = ("llama", "mistral", "qwen2", "qwen3")

pytestmark = pytest.mark.skipif(backends.EXTENSION is None, reason=str(backends.available()["cpp"]))


@pytest.fixture
def calls(monkeypatch):
    """The rows of each call of `lm_head_argmax`, which runs for the few logits of the tests too."""
    monkeypatch.setattr(head_module, "_LEAST_BYTES", 0)
    rows, op = [], head_module.lm_head_argmax

    def count(hidden, *arguments, **options):
        rows.append(hidden.shape[0] * hidden.shape[1])
        return op(hidden, *arguments, **options)

    monkeypatch.setattr(head_module, "lm_head_argmax", count)
    return rows


def decode(model, rows=3, max_new_tokens=40, config=JacobiConfig(block_size=7), **options):
    """Tokens of Jacobi decoding, which are checked to be those of AR; and the generator."""
    inputs = make_prompts(rows)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens} | options
    expected = model.generate(**inputs, **options)
    generator = JacobiGenerator(model, config)
    got = generator.generate(**inputs, **options)
    assert torch.equal(got, expected)
    return got, generator


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_generate(family, tied, calls):
    model = make_model(family, seed=4)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    decode(model)
    assert bool(calls) == (family in KNOWN)


@pytest.mark.parametrize("family", ["Cohere", "Cohere2", "Gemma2", "Granite", "Phi"])
def test_heads_with_more_than_a_product_are_left_alone(family, calls):
    decode(make_family(family))
    assert not calls


CONFIGS = {
    "window": JacobiConfig(block_size=6),
    "block": JacobiConfig(block_size=6, mode="block", record_trajectory=True),
    "trajectory": JacobiConfig(block_size=6, record_trajectory=True),
    "last": JacobiConfig(block_size=12, draft="last"),
    "lookup": JacobiConfig(block_size=6, draft="lookup"),
    "one token": JacobiConfig(draft="none"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_everything_is_as_with_logits(name, dtype, calls, monkeypatch):
    """Rows of all lengths that end at different times: tokens, statistics and trajectories, in bfloat16 too."""
    model = make_model("llama", seed=2, dtype=dtype)
    inputs = make_prompts(5)
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": [1, *range(60, 67)]}

    def run():
        generator = JacobiGenerator(model, CONFIGS[name])
        tokens = generator.generate(**inputs, **options).tolist()
        statistics = dataclasses.asdict(generator.statistics)
        return tokens, {k: v for k, v in statistics.items() if not k.endswith("seconds")}, generator.trajectory

    without = run()
    assert len(calls) == without[1]["forwards"]
    monkeypatch.setattr(module_under_test, "plain_head", lambda *arguments: None)
    assert run() == without and len(calls) == without[1]["forwards"]


class Suppress(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([5]), -torch.inf)


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": [Suppress()]},
        {"output_scores": True, "return_dict_in_generate": True},
        {"output_logits": True, "return_dict_in_generate": True},
        {"do_sample": True, "seed": 3},
        {"optimize": False},
        {"backend": "torch"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_needs_logits_gets_them(options, calls):
    JacobiGenerator(make_model()).generate(**make_prompts(1), **{"do_sample": False, "max_new_tokens": 6} | options)
    assert not calls


class StopAt(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= 21 + (input_ids[:, -1] % 2)


def test_stopping_criteria_and_streams_need_none(calls):
    decode(make_model(seed=4), stopping_criteria=[StopAt()])
    assert calls
    model, parts = make_model(seed=4), []
    generator = JacobiGenerator(model)
    tokens = generator.generate(**make_prompts(1), do_sample=False, max_new_tokens=20, on_commit=parts.append)
    assert sum(parts, []) == tokens[0, 12:].tolist()


def test_wide_windows_go_to_the_linear_layer(calls, monkeypatch):
    """The first forwards of a batch hold more rows than the kernel is good for, the later ones fewer."""
    monkeypatch.setattr(head_module, "fast_rows", lambda dtype, size: 14)
    decode(make_model(seed=4), eos_token_id=list(range(1, 40)))
    assert calls and max(calls) <= 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_logits_are_made(dtype, calls, monkeypatch):
    """The gate counts bytes of logits: here those of 21 rows, which the first forwards alone hold."""
    monkeypatch.setattr(head_module, "_LEAST_BYTES", 21 * VOCABULARY * dtype.itemsize)
    generator = JacobiGenerator(make_model(seed=4, dtype=dtype), JacobiConfig(block_size=7))
    generator.generate(**make_prompts(3), do_sample=False, max_new_tokens=30, eos_token_id=list(range(1, 40)))
    assert set(calls) == {21} and len(calls) < generator.statistics.forwards


def test_computes_in_the_dtype_of_the_head_alone(monkeypatch):
    monkeypatch.setattr(head_module, "_LEAST_BYTES", 0)
    head = nn.Linear(8, 5, dtype=torch.bfloat16)
    hidden = torch.randn(1, 2, 8, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert isinstance(head_module.predict(head, hidden), Predictions)
        with torch.autocast("cpu", torch.bfloat16):
            assert head_module.predict(head, hidden.float()).shape == (1, 2, 5)
            assert isinstance(head_module.predict(head, hidden), torch.Tensor)


class Doubled(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * -2
        return outputs


class Negated(nn.Linear):
    def forward(self, input):
        return -super().forward(input)


def negate_output(module, arguments, output):
    return -output


def negate_logits(module, arguments, output):
    output.logits = -output.logits
    return output


def negate_input(module, arguments):
    return (-arguments[0],)


def replaced_forward(module):
    before = module.forward
    module.forward = lambda *args, **kwargs: -before(*args, **kwargs)


def doubled(model):
    model.__class__ = Doubled


def negated(model):
    model.lm_head.__class__ = Negated


CHANGES = {
    "hook": lambda model: model.lm_head.register_forward_hook(negate_output),
    "pre-hook": lambda model: model.lm_head.register_forward_pre_hook(negate_input),
    "hook of the model": lambda model: model.register_forward_hook(negate_logits),
    "forward of the head": lambda model: replaced_forward(model.lm_head),
    "class of the head": negated,
    "class of the model": doubled,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_heads_are_respected(change, calls):
    model = make_model(seed=4)
    before, generator = decode(model)
    assert calls
    calls.clear()
    CHANGES[change](model)
    after, _ = decode(model)
    assert not calls and not torch.equal(before, after)


def test_a_head_that_is_replaced_between_calls(calls):
    model = make_model(seed=4)
    inputs = make_prompts(2)
    generator = JacobiGenerator(model)
    outputs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for change in ("none", "module", "weight", "values", "bias"):
            torch.manual_seed(len(outputs))
            if change == "module":
                model.lm_head = nn.Linear(64, VOCABULARY, bias=False)
            elif change == "weight":
                model.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, 64))
            elif change == "values":
                model.lm_head.weight.data.neg_()
            elif change == "bias":
                model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY) * 3)
            calls.clear()
            outputs.append(generator.generate(**inputs, do_sample=False, max_new_tokens=20))
            assert torch.equal(outputs[-1], model.generate(**inputs, do_sample=False, max_new_tokens=20)), change
            assert calls
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 5


def test_lora_on_the_head(calls):
    peft = pytest.importorskip("peft")
    model = make_model(seed=4)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False, r=4, lora_alpha=64)
    )
    decode(adapted)
    assert not calls


def test_nan_raises(calls):
    model = make_model()
    model.lm_head.weight.data[40, 3] = torch.nan
    with pytest.raises(ValueError, match="row 0 at window position 0 hold NaN"):
        JacobiGenerator(model).generate(**make_prompts(2), do_sample=False, max_new_tokens=5)
