"""Decoder layers as a GPU runs them, on the CPU: backend "triton" in its interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import FAMILIES, VOCABULARY, count_calls, make_model, make_prompts
from torch import nn

from cllm_kernels import JacobiConfig, JacobiGenerator, backends, optimize
from cllm_kernels.decoding import CACHE_NAME, JacobiCache
from cllm_kernels.integrations import gpu_layers
from cllm_kernels.integrations import optimize as module_under_test
from cllm_kernels.integrations.attention import as_mask, block_attention_enabled

KNOWN = ("llama", "mistral", "qwen2", "qwen3")
pytestmark = [
    pytest.mark.skipif(backends.available()["triton"] is not None, reason=str(backends.available()["triton"])),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU here, see test_decoding_on_gpu.py"),
]


def run(model, tokens, length=0, cache=None):
    """Logits of a window behind `length` cache rows, and the cache."""
    bounds = torch.zeros(2, tokens.shape[0], dtype=torch.int32)
    cache = cache or JacobiCache(bounds[0], 64, "triton")
    cache.lengths.fill_(length)
    positions = torch.arange(length, length + tokens.shape[1])[None].expand(tokens.shape[0], -1)
    with torch.inference_mode(), block_attention_enabled(model, "triton"):
        outputs = model(
            input_ids=tokens, attention_mask=as_mask(torch.stack((cache.lengths, bounds[1]))), position_ids=positions,
            use_cache=True, **{CACHE_NAME: cache},
        )  # fmt: skip
    return outputs.logits, cache


def tokens_of(*shape):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of each op between the linear layers."""
    return count_calls(monkeypatch, gpu_layers, ("rms_norm", "add_rms_norm", "silu_mul", "block_attention"))


@pytest.mark.parametrize("family", FAMILIES)
def test_swaps_decoder_layers_alone_and_undoes_it(family):
    model = make_model(family)
    with optimize(model, "triton") as done:
        assert done.linears == ()
        assert len(done.layers) == (2 if family in KNOWN else 0)
        assert done.decoders == (("model",) if family in KNOWN else ())
        assert "there torch runs it" in done.left["lm_head"]
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", KNOWN)
def test_logits_are_those_of_the_model(family, dtype, calls):
    model = make_model(family, dtype=dtype)
    exact = copy.deepcopy(model).double() if dtype == torch.float32 else copy.deepcopy(model).float()
    tokens = tokens_of(2, 20)
    want = exact(tokens, use_cache=False).logits.float()
    plain, _ = run(model, tokens)
    with optimize(model, "triton"):
        prompt, cache = run(model, tokens[:, :13])
        assert calls == {
            "rms_norm": 5 if family == "qwen3" else 1, "add_rms_norm": 4, "silu_mul": 2, "block_attention": 2
        }  # fmt: skip
        window, _ = run(model, tokens[:, 13:], 13, cache)
    error, baseline = ((x.float() - want).abs().max() for x in (torch.cat((prompt, window), 1), plain))
    assert error <= 3 * baseline + 1e-6


@pytest.mark.parametrize("family", KNOWN)
def test_jacobi_equals_generate(family, calls):
    model = make_model(family, seed=3)
    inputs, options = make_prompts(2), dict(do_sample=False, max_new_tokens=14)
    want = model.generate(**inputs, **options)
    for optimized in (True, False):
        calls.clear()
        config = JacobiConfig(block_size=4, backend="triton", optimize=optimized)
        assert torch.equal(JacobiGenerator(model, config).generate(**inputs, **options), want)
        assert bool(calls) is optimized


def with_hooked_layer(model, seen):
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))


def with_hooked_norm(model, seen):
    model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output))


def with_norm_of_its_own(model, seen):
    class Norm(nn.Module):
        def forward(self, x):
            seen.append(x)
            return 2 * x

    model.model.norm = Norm()


@pytest.mark.parametrize("change", [with_hooked_layer, with_hooked_norm, with_norm_of_its_own])
def test_what_is_around_the_layers_runs(change, calls):
    model, seen = make_model("llama"), []
    change(model, seen)
    want, _ = run(model, tokens_of(1, 9))
    plain = list(seen)
    seen.clear()
    with optimize(model, "triton") as done:
        assert len(done.layers) == 2
        got, _ = run(model, tokens_of(1, 9))
    assert calls["silu_mul"] == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen, plain, rtol=1e-4, atol=1e-4)


def test_a_layer_inside_which_a_hook_runs_is_left_alone():
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: None)
    with optimize(model, "triton") as done:
        assert done.layers == ("model.layers.1",) and done.decoders == ()
        assert "has hooks" in done.left["model.layers.0"]


def test_calls_with_gradients_or_under_autocast_go_to_the_model(calls):
    model = make_model("llama")
    bounds = torch.zeros(2, 1, dtype=torch.int32)
    cache, hidden = JacobiCache(bounds[0], 64, "torch"), torch.randn(1, 9, model.config.hidden_size)
    with optimize(model, "triton"), block_attention_enabled(model, "torch"):
        layer = model.model.layers[0]
        options = dict(attention_mask=as_mask(bounds), position_embeddings=torch.randn(2, 1, 9, 16).unbind(), **{CACHE_NAME: cache})
        layer(hidden, **options)
        assert not calls
        with torch.no_grad():
            assert layer.forward.takes(hidden, cache) and not layer.forward.takes(hidden.half(), cache)
            with torch.autocast("cpu", torch.bfloat16):
                assert not layer.forward.takes(hidden, cache)


def test_without_triton_layers_are_left_alone(monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(module_under_test, "_kernels", lambda device, backend: "gpu")
    monkeypatch.setattr(backends, "available", lambda: {"triton": "triton is not installed"})
    with optimize(model, "cuda") as done:
        assert done.layers == () and "triton is not installed" in done.left["model.layers.0"]
