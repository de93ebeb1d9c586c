"""In fp32, Jacobi decoding gives the tokens of transformers' greedy generate."""

from __future__ import annotations

import pytest
import torch
from helpers import EOS, FAMILIES, VOCABULARY, make_model, make_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_kernels import JacobiConfig, JacobiGenerator, backends

# Triton's interpreter is slow; it has a test of its own below, and its kernels those in tests/ops.
BACKENDS = [name for name, reason in backends.available().items() if reason is None and name != "triton"]


def test_the_native_backend_is_among_those_tested():
    assert "cpp" in BACKENDS, backends.available()["cpp"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["window", "block"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_generate(family, rows, mode, backend):
    model = make_model(family)
    inputs = make_prompts(rows)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    generator = JacobiGenerator(model, JacobiConfig(block_size=6, mode=mode, backend=backend))
    got = generator.generate(**inputs, do_sample=False, max_new_tokens=40)
    assert torch.equal(got, expected)
    assert generator.statistics.backend == backend


@pytest.mark.skipif(not backends.interpreted(), reason="test_decoding_on_gpu.py runs Triton's kernels here")
@pytest.mark.parametrize(("family", "rows", "mode"), [("llama", 1, "window"), ("gemma2", 2, "block")])
def test_triton_equals_generate(family, rows, mode):
    model = make_model(family)
    inputs = make_prompts(rows)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    generator = JacobiGenerator(model, JacobiConfig(block_size=6, mode=mode, backend="triton"))
    assert torch.equal(generator.generate(**inputs, do_sample=False, max_new_tokens=8), expected)
    assert generator.statistics.backend == "triton"


_MODELS = {family: make_model(family, seed=7) for family in ("llama", "mistral", "gpt_neox")}


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(sorted(_MODELS)),
    rows=st.integers(1, 4),
    width=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    block_size=st.integers(2, 20),
    mode=st.sampled_from(["window", "block"]),
    draft=st.sampled_from(["context", "last", "lookup", "auto", "none"]),
    adaptive=st.booleans(),
    candidates=st.integers(1, 4),
    blocks=st.integers(1, 3),
    max_batch_size=st.none() | st.integers(1, 4),
    max_new_tokens=st.integers(1, 30),
    eos=st.lists(st.integers(3, VOCABULARY - 1), min_size=0, max_size=12, unique=True),
)
def test_equals_generate_on_any_options(
    family, rows, width, seed, block_size, mode, draft, adaptive, candidates, blocks, max_batch_size, max_new_tokens, eos
):
    """Many EOS ids make rows stop early, at different times and inside accepted runs."""
    model = _MODELS[family]
    inputs = make_prompts(rows, width, seed) if width > 4 else {
        "input_ids": torch.randint(3, VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(seed)),
        "attention_mask": torch.ones(rows, width, dtype=torch.int64),
    }
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": [EOS, *eos]}
    expected = model.generate(**inputs, **options)
    if draft == "auto" or adaptive or blocks > 1:
        mode = "window"
    if draft == "none":
        candidates = blocks = 1
    config = JacobiConfig(
        block_size, mode, draft, candidates, blocks, adaptive, seed, max_batch_size=max_batch_size
    )
    generator = JacobiGenerator(model, config)
    assert torch.equal(generator.generate(**inputs, **options), expected)
    assert sum(generator.statistics.steps.values()) == generator.statistics.forwards
    for row in generator.statistics.rows:
        assert row.iterations <= row.tokens <= max_new_tokens
        assert sum(row.accept_histogram) == row.iterations
        assert sum(length * count for length, count in enumerate(row.accept_histogram)) == row.tokens
        assert row.fast_forwarded == row.tokens - row.iterations
        assert row.stationary <= row.fast_forwarded


def test_each_row_equals_its_own_batch_of_one():
    model = make_model("qwen2", seed=3)
    inputs = make_prompts(6, seed=5)
    generator = JacobiGenerator(model, JacobiConfig(block_size=8))
    together = generator.generate(**inputs, do_sample=False, max_new_tokens=32)
    tokens = [row.tokens for row in generator.statistics.rows]
    for row in range(6):
        pads = int((inputs["attention_mask"][row] == 0).sum())
        alone = generator.generate(inputs["input_ids"][row : row + 1, pads:], do_sample=False, max_new_tokens=32)
        assert alone[0, 12 - pads :].tolist() == together[row, 12 : 12 + tokens[row]].tolist()


def test_bf16_equals_one_token_at_a_time_through_the_same_block():
    """In bf16 a block rounds unlike a single token, so the reference decodes through blocks of the same width."""
    model = make_model("llama", seed=2, dtype=torch.bfloat16)
    inputs = make_prompts(1, seed=9)["input_ids"]
    size, count = 8, 48
    got = JacobiGenerator(model, JacobiConfig(block_size=size)).generate(
        inputs, do_sample=False, max_new_tokens=count, eos_token_id=None
    )
    # A draft source of its own, whose guesses are never right: at most one token is committed by a forward.
    tokens = inputs[0].tolist()
    from cllm_kernels.decoding import CACHE_NAME, JacobiCache
    from cllm_kernels.integrations.attention import as_mask, block_attention_enabled

    bounds = torch.zeros(2, 1, dtype=torch.int32)
    cache = JacobiCache(bounds[0], len(tokens) + count + size)
    with torch.inference_mode(), block_attention_enabled(model, "cpp"):
        for step in range(count):
            first = len(tokens) - 1 if step else 0
            bounds[0] = first
            block = tokens[first:] + [5] * (size - 1)
            logits = model(
                input_ids=torch.tensor([block]),
                attention_mask=as_mask(bounds),
                position_ids=torch.arange(first, first + len(block))[None],
                **{CACHE_NAME: cache},
            ).logits
            tokens.append(int(logits[0, -size].argmax()))
    assert got[0].tolist() == tokens
