"""Models as others hand them over: placed by device_map, quantised, with adapters, compiled."""

from __future__ import annotations

import pytest
import torch
from helpers import Frames, make_model, make_prompts
from transformers import AutoModelForCausalLM

from cllm_kernels import JacobiConfig, JacobiGenerator, disable_jacobi, enable_jacobi, jacobi_generate
from cllm_kernels.integrations.generate import _fingerprint

GREEDY = dict(do_sample=False, max_new_tokens=24)
CONFIG = JacobiConfig(block_size=6)


def check(model, rows=(1, 3)):
    for count in rows:
        inputs = make_prompts(count)
        expected = model.generate(**inputs, **GREEDY)
        assert torch.equal(JacobiGenerator(model, CONFIG).generate(**inputs, **GREEDY), expected)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map, tmp_path):
    make_model(seed=2).save_pretrained(tmp_path)
    check(AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map))


def test_a_model_spread_over_devices_is_refused(tmp_path):
    make_model(seed=2).save_pretrained(tmp_path)
    placed = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=placed | {"model.layers.1": "disk", "lm_head": "cpu"}, offload_folder=tmp_path / "off"
    )
    with pytest.raises(NotImplementedError, match="spread over 2 devices"):
        JacobiGenerator(model)


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_quantised_by_torchao(name):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = make_model(seed=3)
    full = model(make_prompts(1)["input_ids"]).logits
    quantization.quantize_(model, getattr(quantization, name)())
    assert not torch.equal(model(make_prompts(1)["input_ids"]).logits, full)
    check(model)
    # Graphs hold addresses, which such a weight has in the tensors that it is made of.
    before = _fingerprint(model)
    assert before == _fingerprint(model)
    projection = model.model.layers[0].mlp.down_proj
    projection.weight = torch.nn.Parameter(projection.weight.clone(), requires_grad=False)
    assert before != _fingerprint(model)


def adapted(config, model):
    """A PEFT model whose adapter changes the output."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    return peft.get_peft_model(model, getattr(peft, config[0])(task_type="CAUSAL_LM", **config[1])).eval()


def test_lora():
    plain = make_model(seed=4)
    before = plain.generate(**make_prompts(1), **GREEDY)
    model = adapted(("LoraConfig", dict(r=4, target_modules="all-linear", init_lora_weights=False)), plain)
    inputs = make_prompts(2)
    expected = model.generate(**inputs, **GREEDY)
    assert expected[0].tolist() != before[0].tolist()
    check(model)
    assert torch.equal(model.generate(**inputs, **GREEDY, custom_generate=jacobi_generate), expected)
    enable_jacobi(model, CONFIG)
    assert torch.equal(model.generate(**inputs, **GREEDY, decoding="jacobi"), expected)
    assert model.generate.generator.statistics.block_size == 6
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    with model.disable_adapter():
        assert model.generate(**make_prompts(1), **GREEDY, decoding="jacobi").tolist() == before.tolist()
    disable_jacobi(model)
    assert "generate" not in model.__dict__
    check(model.merge_and_unload())


def test_learned_prompts_are_refused():
    model = adapted(("PromptTuningConfig", dict(num_virtual_tokens=3)), make_model(seed=4))
    with pytest.raises(NotImplementedError, match="PROMPT_TUNING"):
        JacobiGenerator(model)
    with pytest.raises(NotImplementedError, match="PROMPT_TUNING"):
        enable_jacobi(model)


@pytest.mark.parametrize("how", ["function", "method"])
def test_compiled(how):
    frames, model, inputs = Frames(), make_model(seed=5), make_prompts(1)
    expected = model.generate(**inputs, **GREEDY)
    torch.compiler.reset()
    if how == "function":
        compiled = torch.compile(model, backend=frames)
    else:
        model.compile(backend=frames)
        compiled = model
    generator = JacobiGenerator(compiled, CONFIG)
    assert torch.equal(generator.generate(**inputs, **GREEDY), expected)
    graphs, runs = frames.graphs, frames.runs
    assert runs >= generator.statistics.forwards - 1 > 0
    assert torch.equal(generator.generate(**inputs, **GREEDY), expected)
    assert frames.runs >= runs + generator.statistics.forwards - 1
    if how == "function":
        enable_jacobi(compiled, CONFIG)
        assert torch.equal(compiled.generate(**inputs, **GREEDY, decoding="jacobi"), expected)
        assert torch.equal(compiled.generate(**inputs, **GREEDY), expected)
        disable_jacobi(compiled)
        assert "generate" not in model.__dict__
    for width in (5, 7, 9, 12):
        generator.generate(make_prompts(1, width)["input_ids"], **GREEDY)
    assert frames.graphs <= 3 * graphs, "every call compiles anew"
