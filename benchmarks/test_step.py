"""Times of one forward over a window of n tokens, against one token by each way that there is.

    pytest benchmarks/test_step.py --benchmark-json=step.json

On the CPU alone; models are the bundled CLLM and one of Qwen2.5-0.5B's shape with random weights. Compiling takes
minutes; CLLM_BENCH_COMPILE=0 leaves it out. The speed-up that is printed is over the fastest of all, one token
included: its inverse is what the window costs in steps of one token.
"""

import contextlib
import copy
import functools
import os
from pathlib import Path

import pytest
import torch
from measure import BACKEND, ON_GPU, compare
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config, StaticCache

from cllm_kernels import optimize
from cllm_kernels.decoding import JacobiCache
from cllm_kernels.integrations.attention import as_mask, block_attention_enabled

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTH = 100
COMPILE = os.environ.get("CLLM_BENCH_COMPILE", "1") != "0"
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
MODELS = ("bundled", "qwen2.5-0.5b")

pytestmark = pytest.mark.skipif(ON_GPU or BACKEND != "cpp", reason="optimize swaps layers for C++ ops on the CPU")


@functools.lru_cache(maxsize=1)
def load(name, dtype):
    if name == "bundled":
        path = Path(__file__).parents[1] / "models" / "spider-cllm"
        return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype]).eval()
    config = Qwen2Config(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
        vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def with_shared_weights(model):
    """Another tree of modules over the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def window(model, width):
    """A forward over a window behind LENGTH rows of a `JacobiCache`."""
    bounds = torch.tensor([[LENGTH], [0]], dtype=torch.int32)
    cache = JacobiCache(bounds[0], LENGTH + width, "cpp")
    tokens, positions = torch.arange(width)[None] % 100 + 5, torch.arange(LENGTH, LENGTH + width)[None]
    return lambda: model(
        input_ids=tokens, attention_mask=as_mask(bounds), position_ids=positions, past_key_values=cache, use_cache=True
    )


def eager(model, width):
    """A forward as generate makes it."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.full((1, LENGTH), 7), past_key_values=cache, use_cache=True)
    tokens = torch.arange(width)[None] % 100 + 5

    def step():
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache.crop(-width)

    return step


def compiled(model, width):
    """A compiled forward on a static cache, as generate makes it with `cache_implementation="static"`."""
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 64)
    model(input_ids=torch.full((1, LENGTH), 7), past_key_values=cache, use_cache=True)
    tokens = torch.arange(width)[None] % 100 + 5
    forward = torch.compile(model.forward, dynamic=False)

    def step():
        for layer in cache.layers:
            layer.cumulative_length.fill_(LENGTH)
        forward(input_ids=tokens, past_key_values=cache, use_cache=True)

    step()
    return step


@functools.cache
def compiled_once(name, dtype, width):
    return compiled(with_shared_weights(load(name, dtype)), width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_step(benchmark, report, name, dtype, width):
    model = load(name, dtype)
    block, swapped = with_shared_weights(model), with_shared_weights(model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(block_attention_enabled(block, "cpp"))
        stack.enter_context(block_attention_enabled(swapped, "cpp"))
        done = stack.enter_context(optimize(swapped, "cpp"))
        assert len(done.layers) == model.config.num_hidden_layers and not done.left
        alternatives = {"one token": window(swapped, 1), "not optimized": window(block, width)}
        alternatives["eager"] = eager(model, width)
        alternatives["one token, eager"] = eager(model, 1)
        if COMPILE:
            alternatives["one token, compiled"] = compiled_once(name, dtype, 1)
            if width == 16:
                alternatives["compiled"] = compiled_once(name, dtype, width)
        compare(
            benchmark,
            report,
            window(swapped, width),
            alternatives,
            flops=2 * width * weights // DTYPES[dtype].itemsize,
            nbytes=weights,
            dtype=DTYPES[dtype],
        )
