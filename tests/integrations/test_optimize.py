"""Swapping linear and decoder layers while decoding: what is swapped, what is left alone, and that it is undone."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch
from helpers import COMMON, FAMILIES, VOCABULARY, count_calls, counted, make_model, make_prompts, round_alike
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from cllm_kernels import JacobiConfig, JacobiGenerator, backends, enable_jacobi, optimize
from cllm_kernels.decoding import CACHE_NAME, JacobiCache
from cllm_kernels.integrations import optimize as module_under_test
from cllm_kernels.integrations.attention import as_mask, block_attention_enabled
from cllm_kernels.integrations.generate import _fingerprint
from cllm_kernels.ops.decoder_layers import DecoderLayers

KNOWN = ("llama", "mistral", "qwen2", "qwen3")

pytestmark = pytest.mark.skipif(backends.EXTENSION is None, reason=str(backends.available()["cpp"]))


def forwards(model):
    return {name: getattr(module.forward, "__func__", None) for name, module in model.named_modules()}


def window_forward(model, tokens, length=0, cache=None):
    """Logits of a window behind `length` cache rows, and the cache."""
    bounds = torch.zeros(2, tokens.shape[0], dtype=torch.int32)
    cache = cache or JacobiCache(bounds[0], max(128, tokens.shape[1]), "cpp")
    cache.lengths.fill_(length)
    bounds = torch.stack((cache.lengths, bounds[1]))
    positions = torch.arange(length, length + tokens.shape[1])[None].expand(tokens.shape[0], -1)
    with torch.inference_mode(), block_attention_enabled(model, "cpp"):
        outputs = model(
            input_ids=tokens, attention_mask=as_mask(bounds), position_ids=positions, **{CACHE_NAME: cache},
            use_cache=True,
        )  # fmt: skip
    return outputs.logits, cache


def assert_bits(family, got, want):
    """Equal bits; of Mistral's sliding window it depends on where a tile of queries begins in which order it is added up."""
    if family == "mistral":
        torch.testing.assert_close(got, want)
    else:
        assert torch.equal(got, want)


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of each op that swapped modules make, and of what runs several layers."""
    counts = count_calls(monkeypatch, module_under_test, ("window_linear", "window_qkv", "window_mlp"))
    monkeypatch.setattr(DecoderLayers, "__call__", counted(counts, "DecoderLayers", DecoderLayers.__call__))
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_swaps_what_it_knows_and_undoes_it(family):
    model = make_model(family)
    before, state = forwards(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {f"model.layers.{i}" for i in range(2)}
    with optimize(model) as done:
        assert set(done.linears) == linears
        assert len(done.layers) == (2 if family in KNOWN else 0)
        assert done.decoders == (("model",) if family in KNOWN else ())
        assert set(done.left) == {"gemma2": layers, "phi3": layers}.get(family, set())
        inside = model.state_dict()
        assert inside.keys() == state.keys()
        assert all(tensor.data_ptr() == pointers[name] for name, tensor in inside.items())
    assert forwards(model) == before
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model(family, dtype):
    model = make_model(family, dtype=dtype)
    exact = copy.deepcopy(model).double() if dtype == torch.float32 else copy.deepcopy(model).float()
    tokens = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))
    want = exact(tokens, use_cache=False).logits.float()
    plain, _ = window_forward(model, tokens)
    with optimize(model):
        got, _ = window_forward(model, tokens)
    error, baseline = ((logits.float() - want).abs().max() for logits in (got, plain))
    assert error <= 3 * baseline + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [family for family in KNOWN if family != "mistral"])
def test_a_window_gives_the_bits_of_single_tokens(family, dtype):
    """So that decoding by windows and token by token agree in every dtype.

    Mistral's sliding window is left out: `block_attention` adds up what only some rows of a window see in another order
    than for one row.
    """
    model, width = make_model(family, dtype=dtype), 17 if round_alike(dtype, 1, 17) else 15
    tokens = torch.randint(3, VOCABULARY, (1, width), generator=torch.Generator().manual_seed(2))
    with optimize(model):
        together, _ = window_forward(model, tokens)
        cache = None
        for position in range(width):
            alone, cache = window_forward(model, tokens[:, position : position + 1], position, cache)
            assert torch.equal(alone[:, 0], together[:, position]), position


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_and_long_prompts_run_by_the_ops(family, dtype, calls):
    model = make_model(family, dtype=dtype)
    tokens = torch.randint(3, VOCABULARY, (3, 256))
    plain, _ = window_forward(model, tokens)
    with optimize(model):
        window_forward(model, torch.randint(3, VOCABULARY, (1, 16)))
        assert calls == {"DecoderLayers": 1, "window_linear": 1}  # the last is the LM head
        calls.clear()
        got, _ = window_forward(model, tokens)
        assert calls["DecoderLayers"] == 1
        calls.clear()
        hook = model.model.layers[0].register_forward_hook(lambda *arguments: None)
        one_by_one, _ = window_forward(model, tokens)
        hook.remove()
        assert calls["window_qkv"] == calls["window_mlp"] == 2 and "DecoderLayers" not in calls
    assert torch.equal(one_by_one, got)
    torch.testing.assert_close(got, plain, **dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0, atol=0.05))


def test_where_torch_alone_has_amx_long_prompts_in_bf16_are_left_to_it(calls, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(backends.EXTENSION, "cpu_isa", lambda: "avx512bf16")
    for dtype, times in ((torch.float32, 1), (torch.bfloat16, 0)):
        model, counts = make_model("llama", dtype=dtype), []
        with optimize(model):
            for length in (16, 513):
                calls.clear()
                window_forward(model, torch.randint(3, VOCABULARY, (1, length)))
                counts.append(calls.get("DecoderLayers", 0))
                assert "window_mlp" not in calls
        assert counts == [1, times]


ROPES = {
    "default": dict(rope_type="default"),
    "linear": dict(rope_type="linear", factor=2.0),
    "llama3": dict(
        rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    "dynamic": dict(rope_type="dynamic", factor=2.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rope", ROPES)
def test_angles_are_computed_once_where_each_position_has_its_own(rope, dtype, monkeypatch):
    """They are what the rotary embedding gives: logits have the same bits as where it is asked in every forward."""
    torch.manual_seed(3)
    config = LlamaConfig(**COMMON, rope_parameters=dict(rope_theta=1e4, **ROPES[rope]), attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    kind, asked = type(model.model.rotary_emb), []
    forward = kind.forward
    tokens = torch.randint(3, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(2))

    def logits():
        asked.clear()
        with optimize(model), monkeypatch.context() as patch:  # when it is decided what is swapped
            patch.setattr(kind, "forward", lambda *args, **kwargs: asked.append(1) or forward(*args, **kwargs))
            first, cache = window_forward(model, tokens[:, :21])
            second, _ = window_forward(model, tokens[:, 21:], 21, cache)
        return torch.cat((first, second), 1)

    got = logits()
    assert len(asked) == (2 if rope == "dynamic" else 1)
    monkeypatch.setattr(module_under_test, "_FIXED_ANGLES", set())
    assert torch.equal(got, logits()) and len(asked) == 2


def test_a_rotary_embedding_with_hooks_runs_in_every_forward():
    model, seen = make_model("llama"), []
    model.model.rotary_emb.register_forward_hook(lambda module, args, output: seen.append(output[0].shape))
    with optimize(model):
        _, cache = window_forward(model, torch.randint(3, VOCABULARY, (1, 9)))
        window_forward(model, torch.randint(3, VOCABULARY, (1, 4)), 9, cache)
    assert [shape[1] for shape in seen] == [9, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_norm_runs_by_the_op_unless_it_is_another(dtype, monkeypatch):
    model, tokens = make_model("qwen2", dtype=dtype), torch.randint(3, VOCABULARY, (1, 9))
    counts = count_calls(monkeypatch, module_under_test, ("rms_norm",))
    plain, _ = window_forward(model, tokens)
    with optimize(model):
        got, _ = window_forward(model, tokens)
    assert counts == {"rms_norm": 1}
    torch.testing.assert_close(got, plain, **dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0, atol=0.05))
    model.model.norm.forward = lambda x: torch.zeros_like(x)
    with optimize(model):
        assert not window_forward(model, tokens)[0].any()
    del model.model.norm.forward
    model.model.norm.register_forward_hook(lambda module, args, output: output * 0)
    with optimize(model):
        assert not window_forward(model, tokens)[0].any()
    assert counts == {"rms_norm": 1}


@pytest.mark.parametrize("length", [0, 9])
@pytest.mark.parametrize("family", KNOWN)
def test_the_last_layer_leaves_out_what_nobody_asks_for(family, length):
    model, keep = make_model(family, seed=5), 4
    before, tokens = torch.randint(3, VOCABULARY, (3, length or 1)), torch.randint(3, VOCABULARY, (3, 11))
    bounds = torch.tensor([[0] * 3, [0, 2, 5]], dtype=torch.int32)
    cache = JacobiCache(bounds[0], 32, "cpp")
    seen = []

    def forward(inputs, asked):
        cache.keep = asked
        positions = bounds[0][:, None] - bounds[1][:, None] + torch.arange(inputs.shape[1])
        return model(
            input_ids=inputs, attention_mask=as_mask(bounds), position_ids=positions.clamp(min=0), **{CACHE_NAME: cache},
            use_cache=True, logits_to_keep=keep,
        ).logits  # fmt: skip

    with torch.inference_mode(), block_attention_enabled(model, "cpp"), optimize(model):
        if length:
            forward(before, None)
            bounds[0] = length
        whole, buffers = forward(tokens, None), [tensor.clone() for tensor in cache._buffers[1]]
        torch.testing.assert_close(forward(tokens, keep), whole, rtol=1e-5, atol=1e-5)
        for mine, other in zip(cache._buffers[1], buffers):  # the cache gets all, but padding
            for row, first in enumerate(bounds.amax(0)):
                assert_bits(family, mine[row, :, first : length + 11], other[row, :, first : length + 11])
        for module in (model.model, model.model.layers[-1], model.model.norm, model.lm_head):
            see = lambda module, args, output: seen.append(getattr(output, "last_hidden_state", output).shape[1])  # noqa: E731
            hook = module.register_forward_hook(see)
            torch.testing.assert_close(forward(tokens, keep), whole, rtol=1e-5, atol=1e-5)
            hook.remove()
    assert seen == [11, 11, 11, keep]


@pytest.fixture
def rows(monkeypatch):
    """Tokens that each layer gets."""
    seen, op, call = [], module_under_test.window_qkv, DecoderLayers.__call__

    def see(x, *arguments):
        seen.append(x.shape[0] * x.shape[1])
        return op(x, *arguments)

    def see_layers(layers, x, *arguments):
        seen.extend([x.shape[0] * x.shape[1]] * 2)  # there are two
        return call(layers, x, *arguments)

    monkeypatch.setattr(module_under_test, "window_qkv", see)
    monkeypatch.setattr(DecoderLayers, "__call__", see_layers)
    return seen


def prefill(model, inputs, **options):
    options = dict(do_sample=False, max_new_tokens=1) | options
    return JacobiGenerator(model, JacobiConfig(block_size=4)).generate(**inputs, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", KNOWN)
def test_padding_of_prompts_is_left_out(family, dtype, rows, monkeypatch):
    """And what comes out has the bits that it has with it, unless there is a sliding window."""
    model, inputs = make_model(family, seed=6, dtype=dtype), make_prompts(5)
    options = dict(output_logits=True, return_dict_in_generate=True, max_new_tokens=12)
    packed = prefill(model, inputs, **options)
    drafts = 5 * 3
    assert rows[:2] == [int(inputs["attention_mask"].sum()) + drafts] * 2
    rows.clear()
    monkeypatch.setattr(module_under_test, "_packing", lambda *arguments: None)
    padded = prefill(model, inputs, **options)
    assert rows[:2] == [inputs["input_ids"].numel() + drafts] * 2
    assert torch.equal(packed.sequences, padded.sequences)
    for one, other in zip(packed.logits, padded.logits, strict=True):
        assert_bits(family, one, other)


def test_padding_stays_where_a_hook_would_miss_it_or_a_row_has_nothing_else(rows):
    model, inputs = make_model("llama", seed=6), make_prompts(5)
    want, shape = prefill(model, inputs), (5, inputs["input_ids"].shape[1] + 3)
    seen = []
    for module in model.model.layers:
        rows.clear()
        hook = module.register_forward_hook(lambda module, args, output: seen.append(output.shape[:2]))
        assert torch.equal(prefill(model, inputs), want)
        hook.remove()
        assert rows == [5 * shape[1]] * 2
    assert seen == [shape, shape]
    mask = as_mask(torch.tensor([[0, 0], [0, 6]], dtype=torch.int32))
    assert module_under_test._packing(mask, 9, 4) is None and module_under_test._packing(mask, 10, 4) is not None
    assert module_under_test._packing(as_mask(torch.tensor([[6, 9], [0, 6]], dtype=torch.int32)), 10, 4) is None


@pytest.mark.parametrize("family", KNOWN)
def test_as_many_layers_run_as_the_configuration_says(family):
    model, tokens = make_model(family, seed=5), torch.randint(3, VOCABULARY, (2, 7))
    with optimize(model):
        whole, _ = window_forward(model, tokens)
    model.config.num_hidden_layers = 1
    want, _ = window_forward(model, tokens)
    with optimize(model):
        got, _ = window_forward(model, tokens)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, whole, atol=1e-2)


@pytest.mark.parametrize("where", ["model", "decoder", "layer", "everywhere"])
def test_hooks_see_every_forward(where):
    """Although a window goes through all layers in one call where nothing has hooks."""
    model, inputs = make_model("llama", seed=6), make_prompts(1)
    want, seen = prefill(model, inputs, max_new_tokens=9), []
    modules = {"model": model, "decoder": model.model, "layer": model.model.layers[0]}

    def see(module, args, output):
        seen.append(module)

    if where == "everywhere":
        hook = nn.modules.module.register_module_forward_hook(see)
    else:
        hook = modules[where].register_forward_hook(see)
    generator = JacobiGenerator(model, JacobiConfig(block_size=4))
    got = generator.generate(**inputs, do_sample=False, max_new_tokens=9)
    hook.remove()
    assert torch.equal(got, want)
    for module in modules.values() if where == "everywhere" else [modules[where]]:
        assert seen.count(module) == generator.statistics.forwards > 1


def test_only_known_models_keep_the_last_positions_alone():
    class Head(LlamaForCausalLM):
        pass

    model = make_model("llama")
    assert module_under_test.keeps_last(model)
    assert not module_under_test.keeps_last(Head(model.config))
    assert not module_under_test.keeps_last(model.model) and not module_under_test.keeps_last(make_model("gemma2"))


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_jacobi_equals_generate_with_and_without(family, optimized, calls):
    model = make_model(family, seed=4)
    inputs = make_prompts(3)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    generator = JacobiGenerator(model, JacobiConfig(block_size=7, optimize=optimized))
    assert torch.equal(generator.generate(**inputs, do_sample=False, max_new_tokens=40), expected)
    assert bool(calls) == optimized
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_tokens_in_bf16_are_those_of_single_tokens():
    """In bf16 too, without a block of the same width on both sides."""
    model = make_model("llama", seed=2, dtype=torch.bfloat16)
    inputs = make_prompts(1, seed=9)["input_ids"]
    got = JacobiGenerator(model, JacobiConfig(block_size=8)).generate(
        inputs, do_sample=False, max_new_tokens=48, eos_token_id=None
    )[0].tolist()
    tokens, cache = inputs[0].tolist(), None
    with optimize(model):
        for position in range(len(got) - 1):
            logits, cache = window_forward(model, torch.tensor([[tokens[position]]]), position, cache)
            if position + 1 >= len(tokens):
                tokens.append(int(logits[0, -1].argmax()))
    assert got == tokens


def test_switches():
    model = make_model()
    enable_jacobi(model, JacobiConfig(block_size=4), optimize=False)
    assert model.generate.generator.config == JacobiConfig(block_size=4, optimize=False)
    assert enable_jacobi(model).generate.generator.config.optimize
    with pytest.raises(ValueError, match="optimize is 'yes'; it must be True or False"):
        JacobiConfig(optimize="yes")


def test_undone_after_an_exception(monkeypatch):
    model = make_model()
    with pytest.raises(RuntimeError, match="stop"), optimize(model):
        raise RuntimeError("stop")
    assert not any("forward" in module.__dict__ for module in model.modules())

    def fail(*arguments):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(module_under_test, "_swapped_linear", fail)
    model = make_model()
    with pytest.raises(RuntimeError, match="in the middle"), optimize(model):
        pass
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_nothing_is_swapped_without_the_kernels():
    model = make_model()
    with optimize(model, "torch") as done:
        assert not done.linears and not done.layers
        assert "there torch runs it" in done.left["lm_head"]
        assert not any("forward" in module.__dict__ for module in model.modules())


class LowRank(nn.Linear):
    """An adapter as a subclass."""

    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


class Quantised(torch.Tensor):
    """Weights of another kind."""


def with_subclass(model):
    old = model.model.layers[0].self_attn.q_proj
    new = LowRank(old.in_features, old.out_features, bias=old.bias is not None)
    new.load_state_dict(old.state_dict())
    model.model.layers[0].self_attn.q_proj = new
    return "self_attn.q_proj", "it is a LowRank", "self_attn.q_proj is a LowRank"


def with_replaced_forward(model):
    linear = model.model.layers[0].mlp.up_proj
    linear.forward = lambda x, before=linear.forward: 2 * before(x)
    return "mlp.up_proj", "its forward was replaced", "the forward of mlp.up_proj was replaced"


def with_other_weights(model):
    linear = model.model.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    return "mlp.down_proj", "its weight is a Quantised", "mlp.down_proj: its weight is a Quantised"


def with_half_weights(model):
    linear = model.model.layers[0].mlp.down_proj.half()
    linear.register_forward_pre_hook(lambda module, args: (args[0].half(),))
    linear.register_forward_hook(lambda module, args, output: output.float())
    return "mlp.down_proj", "its weight is in torch.float16", "has hooks"


def with_parametrization(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(model.model.layers[0].mlp.gate_proj, "weight", Doubled())
    return "mlp.gate_proj", "it is a ParametrizedLinear", "it has other submodules than its class is known for"


@pytest.mark.parametrize(
    "change", [with_subclass, with_replaced_forward, with_other_weights, with_half_weights, with_parametrization]
)
def test_what_is_not_plain_is_left_alone(change):
    model = make_model("llama", seed=5)
    name, linear_reason, layer_reason = change(model)
    inputs = make_prompts(2)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    with optimize(model) as done:
        assert linear_reason in done.left[f"model.layers.0.{name}"]
        assert layer_reason in done.left["model.layers.0"]
        assert done.layers == ("model.layers.1",)
    got = JacobiGenerator(model, JacobiConfig(block_size=5)).generate(**inputs, do_sample=False, max_new_tokens=24)
    assert torch.equal(got, expected)


def with_hook(model):
    def double(module, arguments, output):
        return 2 * output

    model.model.layers[0].mlp.gate_proj.register_forward_hook(double)
    return "model.layers.0", "mlp.gate_proj has hooks"


def with_other_norm(model):
    layer = model.model.layers[0]
    layer.input_layernorm = nn.LayerNorm(layer.input_layernorm.weight.shape[0])
    return "model.layers.0", "input_layernorm is a LayerNorm"


def with_swapped_layers(model):
    model.model.layers = nn.ModuleList([make_model("llama", seed=6).model.layers[0], model.model.layers[1]])
    return None, None


def with_new_weights(model):
    projection = model.model.layers[1].mlp.down_proj
    projection.weight = nn.Parameter(-projection.weight.detach())
    return None, None


def with_transposed_weights(model):
    projection = model.model.layers[1].mlp.down_proj
    projection.weight.data = projection.weight.data.T.contiguous().T
    return "model.layers.1.mlp.down_proj", "its weight is not contiguous"


@pytest.mark.parametrize(
    "change",
    [with_hook, with_other_norm, with_swapped_layers, with_new_weights, with_transposed_weights, with_replaced_forward],
)
def test_a_model_that_changes_between_calls(change):
    """What was found out about it in an earlier call is not used for what it is now."""
    model = make_model("llama", seed=5)
    inputs = make_prompts(2)
    generator = JacobiGenerator(model, JacobiConfig(block_size=5))
    generator.generate(**inputs, do_sample=False, max_new_tokens=24)
    with optimize(model) as done:
        assert not done.left
    reason = change(model)[1]
    with optimize(model) as done:
        assert any(reason in text for text in done.left.values()) if reason else not done.left
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    for _ in range(2):
        assert torch.equal(generator.generate(**inputs, do_sample=False, max_new_tokens=24), expected)


def test_a_model_that_was_optimized_is_freed():
    model = make_model("llama")
    with optimize(model):
        pass
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("name", ["mlp.gate_proj", "mlp", "input_layernorm", "self_attn", ""])
@pytest.mark.parametrize("pre", [False, True])
def test_hooks_run(name, pre):
    """On a linear layer, on a module of which the calls would have been left out, and on the decoder layer."""
    model = make_model("llama")
    tokens = torch.randint(3, VOCABULARY, (1, 6))
    module = model.model.layers[0].get_submodule(name)
    seen = []
    if pre:
        module.register_forward_pre_hook(lambda *args: seen.append(name))
    else:
        module.register_forward_hook(lambda *args: seen.append(name))
    plain, _ = window_forward(model, tokens)
    assert seen == [name]
    with optimize(model) as done:
        got, _ = window_forward(model, tokens)
        assert ("model.layers.0" in done.layers) == (name == "")
    assert seen == [name] * 2
    torch.testing.assert_close(got, plain)


def test_tied_embeddings_stay_tied():
    model = make_model("gemma2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with optimize(model):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.model.embed_tokens.weight.data.mul_(0.5)  # seen at once: nothing is cached
        got, _ = window_forward(model, torch.randint(3, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(0)))
    plain, _ = window_forward(model, torch.randint(3, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(got, plain)


def test_weights_that_are_replaced_are_used():
    model = make_model("llama")
    tokens = torch.randint(3, VOCABULARY, (1, 6))
    with optimize(model):
        before, _ = window_forward(model, tokens)
        model.model.layers[1].mlp.up_proj.weight = nn.Parameter(2 * model.model.layers[1].mlp.up_proj.weight.detach())
        model.lm_head.weight.data.neg_()
        after, _ = window_forward(model, tokens)
    plain, _ = window_forward(model, tokens)
    torch.testing.assert_close(after, plain)
    assert not torch.allclose(before, after)


def test_training_inside_and_autocast():
    """Gradients and autocast are torch's business."""
    tokens = torch.randint(3, VOCABULARY, (2, 8))
    gradients = []
    for swapped in (False, True):
        model = make_model("qwen2").train()
        if swapped:
            with optimize(model):
                model(tokens, labels=tokens).loss.backward()
        else:
            model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())

    linear = nn.Sequential(nn.Linear(8, 8))
    with optimize(linear), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.ones(2, 8)).dtype == torch.bfloat16


def test_models_inside_can_be_saved(tmp_path):
    model = make_model("llama")
    with optimize(model):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_weights_that_are_no_parameters_are_left_alone():
    model = make_model("llama", seed=2)
    layer = model.model.layers[0]
    prune.l1_unstructured(layer.mlp.up_proj, "weight", amount=0.3)
    norm = layer.input_layernorm
    weight = norm.weight.detach()
    del norm.weight
    norm.weight = weight
    inputs = make_prompts(2)
    want = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    assert torch.equal(JacobiGenerator(model, JacobiConfig(6)).generate(**inputs, do_sample=False, max_new_tokens=24), want)
    with optimize(model, "cpp") as done:
        assert done.left["model.layers.0.mlp.up_proj"] == "its weight is no parameter"
        assert "model.layers.0" in done.left and "model.layers.1" in done.layers


def test_global_hooks_run_in_every_module():
    model, seen = make_model("llama", seed=2), []

    def double(module, args, output):
        if type(module).__name__ == "LlamaMLP":
            seen.append(module)
            return output * 2

    inputs, options = make_prompts(2), dict(do_sample=False, max_new_tokens=24)
    plain = model.generate(**inputs, **options)
    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        want = model.generate(**inputs, **options)
        seen.clear()
        got = JacobiGenerator(model, JacobiConfig(6)).generate(**inputs, **options)
    finally:
        handle.remove()
    assert seen and torch.equal(got, want) and not torch.equal(want, plain)


def changed(output):
    """Another output of the same form."""
    if isinstance(output, torch.Tensor):
        return output.roll(1, -1)
    if isinstance(output, tuple):
        return changed(output[0]) * 9, *output[1:]
    output[next(iter(output))] = changed(output[next(iter(output))])
    return output


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize(
    "name",
    ["MLP", "RMSNorm", "Attention", "DecoderLayer", "Model", "ForCausalLM", "RotaryEmbedding", "Linear", "rotary function"],
)
def test_what_was_replaced_of_a_class_runs(name, wraps, monkeypatch):
    model, inputs, options = make_model("llama", seed=2), make_prompts(2), dict(do_sample=False, max_new_tokens=24)
    generator = JacobiGenerator(model, JacobiConfig(6))
    plain, fingerprint = model.generate(**inputs, **options), _fingerprint(model)
    assert torch.equal(generator.generate(**inputs, **options), plain)
    if name == "rotary function":
        owner, attribute = modeling_llama, "apply_rotary_pos_emb"
    else:
        owner, attribute = getattr(modeling_llama, f"Llama{name}", nn.Linear), "forward"
    before = getattr(owner, attribute)

    def replacement(*args, **kwargs):
        return changed(before(*args, **kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, functools.wraps(before)(replacement) if wraps else replacement)
        want = model.generate(**inputs, **options)
        assert torch.equal(generator.generate(**inputs, **options), want) and not torch.equal(want, plain)
        assert name == "rotary function" or _fingerprint(model) != fingerprint  # no graph from before is used
        with optimize(model) as done:
            inside = name in ("MLP", "RMSNorm", "Attention", "DecoderLayer", "Linear", "rotary function")
            assert bool(done.layers) != inside and bool(done.linears) == (name != "Linear")
            assert not inside or "was replaced" in done.left["model.layers.0"]
            assert bool(done.decoders) == (name == "ForCausalLM")
    assert torch.equal(generator.generate(**inputs, **options), plain)
    with optimize(model) as done:
        assert done.layers and done.linears and done.decoders


def test_another_rotary_embedding_is_asked_in_every_forward():
    class Later(modeling_llama.LlamaRotaryEmbedding):
        def forward(self, x, position_ids):
            return super().forward(x, position_ids * int(position_ids.max()))

    model = make_model("llama", seed=2)
    model.model.rotary_emb = Later(model.config)
    tokens = torch.randint(3, VOCABULARY, (1, 4))
    plain, _ = window_forward(model, tokens)
    with optimize(model):
        got, _ = window_forward(model, tokens)
    torch.testing.assert_close(got, plain)
