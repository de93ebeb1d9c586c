"""The three doors to Jacobi decoding, what they refuse, and that they leave the model as it was."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import threading
from concurrent import futures

import pytest
import torch
from families import make_family
from helpers import EOS, FAMILIES, PAD, make_model, make_prompts
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PLBartConfig,
    PLBartForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from cllm_kernels import (
    JacobiConfig,
    JacobiGenerator,
    JacobiOutput,
    disable_jacobi,
    enable_jacobi,
    jacobi_generate,
    verify,
)
from cllm_kernels.decoding import CACHE_NAME

GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def inputs():
    return make_prompts(1)


def snapshot(model):
    return (
        model.config._attn_implementation,
        model.training,
        [module.training for module in model.modules()],
        sorted(model.__dict__),
        sorted(model.state_dict()),
    )


class Recorder(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


def test_three_doors_open_the_same_room(model, inputs):
    expected = model.generate(**inputs, **GREEDY)
    before = snapshot(model)
    assert torch.equal(model.generate(**inputs, **GREEDY, custom_generate=jacobi_generate, block_size=5), expected)
    assert torch.equal(JacobiGenerator(model, JacobiConfig(block_size=5)).generate(**inputs, **GREEDY), expected)
    assert snapshot(model) == before
    enable_jacobi(model)
    assert torch.equal(model.generate(**inputs, **GREEDY, decoding="jacobi", block_size=5), expected)
    assert model.generate.generator.statistics.block_size == 5
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert torch.equal(model.generate(inputs["input_ids"], GenerationConfig(**GREEDY), decoding="ar"), expected)
    assert torch.equal(model.generate(inputs["input_ids"], GenerationConfig(**GREEDY), decoding="jacobi"), expected)
    disable_jacobi(model)
    assert snapshot(model) == before
    disable_jacobi(model)  # twice does nothing


def test_an_enabled_model_survives_copy_pickle_and_inspection(model, inputs, tmp_path):
    plain = list(inspect.signature(model.generate).parameters)
    state = sorted(model.state_dict())
    enable_jacobi(model, JacobiConfig(block_size=5))
    expected = model.generate(**inputs, **GREEDY)
    assert list(inspect.signature(model.generate).parameters) == plain
    assert sorted(model.state_dict()) == state
    model.save_pretrained(tmp_path)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.generate.generator.model is other
        assert torch.equal(other.generate(**inputs, **GREEDY, decoding="jacobi"), expected)


def test_return_dict_and_statistics(model, inputs):
    generator = JacobiGenerator(model, JacobiConfig(block_size=5, record_trajectory=True))
    output = generator.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert isinstance(output, JacobiOutput)
    run = output.statistics
    assert run is generator.statistics
    assert run.forwards == run.iterations == sum(run.accept_histogram) == len(output.trajectory[0])
    assert run.tokens == output.sequences.shape[1] - inputs["input_ids"].shape[1]
    assert run.prefill_seconds > 0 and run.decode_seconds > 0
    assert run.backend in ("cpp", "torch")
    new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    for (start, drafts), (following, _) in zip(output.trajectory[0], output.trajectory[0][1:], strict=False):
        assert len(drafts) == 4
        accepted = following - start
        assert drafts[: accepted - 1] == new[start : following - 1]  # accepted drafts are committed tokens
        if accepted < 5 and following < len(new):
            assert drafts[accepted - 1] != new[following - 1]  # the first wrong draft ended the run


def test_streamer_gets_every_token_once_in_order(model, inputs):
    expected, got = Recorder(), Recorder()
    model.generate(**inputs, **GREEDY, streamer=expected)
    commits = []
    JacobiGenerator(model).generate(**inputs, **GREEDY, streamer=got, on_commit=commits.append)
    assert got.values == expected.values
    assert got.ended == 1
    assert sum(commits, []) == sum(expected.values[1:], [])


def test_text_iterator_streamer_in_a_thread(inputs):
    class Tokenizer:
        def decode(self, tokens, **kwargs):
            return " ".join(map(str, tokens)) + " "

    model = make_model()
    expected = model.generate(**inputs, **GREEDY)[0].tolist()
    streamer = TextIteratorStreamer(Tokenizer(), timeout=60)
    thread = threading.Thread(
        target=JacobiGenerator(model).generate, kwargs=inputs | GREEDY | {"streamer": streamer}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert [int(word) for word in text.split()] == expected


def test_rows_are_padded_behind_their_eos():
    model = make_model(seed=4)
    inputs = make_prompts(5, seed=4)
    eos = [EOS, *range(3, 40)]
    expected = model.generate(**inputs, **GREEDY, eos_token_id=eos)
    assert (expected == PAD).sum() > (inputs["attention_mask"] == 0).sum()  # some rows stop early
    assert torch.equal(JacobiGenerator(model).generate(**inputs, **GREEDY, eos_token_id=eos), expected)


def test_training_mode_is_put_back(model, inputs):
    expected = model.generate(**inputs, **GREEDY)
    model.train()
    model.model.layers[0].eval()
    before = snapshot(model)
    assert torch.equal(JacobiGenerator(model).generate(**inputs, **GREEDY), expected)
    assert snapshot(model) == before


REFUSED = {
    "beams": ({"num_beams": 2}, NotImplementedError, "num_beams=2"),
    "sequences": ({"num_return_sequences": 2, "num_beams": 2}, NotImplementedError, "num_"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, NotImplementedError, "prompt_lookup_num_tokens=3"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, NotImplementedError, "penalty_alpha=0.6"),
    "attentions": ({"output_attentions": True}, NotImplementedError, "output_attentions=True"),
    "no cache": ({"use_cache": False}, NotImplementedError, "use_cache=False"),
    "guidance": ({"guidance_scale": 1.5}, NotImplementedError, "guidance_scale"),
    "negative temperature": ({"do_sample": True, "temperature": -1.0}, ValueError, "temperature"),
    "greedy sequences": ({"num_return_sequences": 2}, ValueError, "num_return_sequences"),
    "stop strings": ({"stop_strings": ["x"]}, ValueError, "tokenizer"),
    "two seeds": ({"seed": 1, "generator": torch.Generator()}, ValueError, "both seed and generator"),
    "seeds of other rows": ({"seed": [1, 2]}, ValueError, "2 seeds for 1 rows"),
    "generator": ({"generator": 3}, TypeError, "generator is a int"),
    "assistant": ({"assistant_model": make_model()}, NotImplementedError, "assistant_model"),
    "custom": ({"custom_generate": jacobi_generate}, NotImplementedError, "custom_generate"),
    "cache": ({CACHE_NAME: object()}, NotImplementedError, CACHE_NAME),
    "cache by its old name": ({"past_key_values": object()}, NotImplementedError, "cache|past_key_values"),
    "positions": ({"position_ids": torch.arange(3, 15)[None]}, NotImplementedError, "position_ids"),
    "right padding": (
        {"attention_mask": torch.tensor([[1] * 10 + [0] * 2])},
        ValueError,
        "padded on the left",
    ),
    "hole": ({"attention_mask": torch.tensor([[1] * 5 + [0] + [1] * 6])}, ValueError, "zeros, then ones"),
    "mask shape": ({"attention_mask": torch.ones(1, 7, dtype=torch.int64)}, ValueError, "shape"),
    "length": ({"max_new_tokens": 250}, ValueError, "262 positions; the model has 256"),
    "constraints": ({"constraints": [object()]}, (NotImplementedError, ValueError), "onstraint"),
    "forced words": ({"force_words_ids": [[3]]}, (NotImplementedError, ValueError), "force_words_ids"),
    "hidden states": ({"output_hidden_states": True}, NotImplementedError, "output_hidden_states=True"),
    "layers": ({"dola_layers": "high"}, NotImplementedError, "dola_layers='high'"),
    "temperature 0": ({"do_sample": True, "temperature": 0.0}, ValueError, "temperature"),
    "top p": ({"do_sample": True, "top_p": -0.5}, ValueError, "top_p"),
    "no tokens": ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 12, 64)}, NotImplementedError, "inputs_embeds"),
    "adaptive text": ({"adaptive": "yes"}, ValueError, "adaptive is 'yes'"),
    "graph text": ({"cuda_graph": "yes"}, ValueError, "cuda_graph is 'yes'"),
    "no candidates": ({"candidates": 0}, ValueError, "candidates is 0"),
    "no rows": ({"max_batch_size": 0}, ValueError, "max_batch_size is 0; it must be an integer of at least 1"),
    "half a row": ({"max_batch_size": 0.5}, ValueError, "max_batch_size is 0.5"),
    "candidates text": ({"candidates": "2"}, ValueError, "candidates is '2'"),
    "candidates of one token": ({"candidates": 2, "draft": "none"}, ValueError, "needs candidates=1"),
    "candidates in a trajectory": ({"candidates": 2, "record_trajectory": True}, ValueError, "record_trajectory=False"),
    "no blocks": ({"blocks": 0}, ValueError, "blocks is 0"),
    "blocks of one token": ({"blocks": 2, "draft": "none"}, ValueError, "needs blocks=1"),
    "blocks to their fixed point": ({"blocks": 2, "mode": "block"}, ValueError, "needs mode='window'"),
    "block size 1": ({"block_size": 1}, ValueError, "block_size is 1"),
    "block size text": ({"block_size": "4"}, ValueError, "block_size is '4'"),
    "block size beyond the cache": ({"block_size": 257}, ValueError, "at most 256"),
    "mode": ({"mode": "fast"}, ValueError, "window, block"),
    "draft": ({"draft": "oracle"}, ValueError, "context, last, lookup, auto, none"),
    "adaptive blocks": ({"mode": "block", "adaptive": True}, ValueError, "needs mode='window'"),
    "auto trajectory": ({"draft": "auto", "record_trajectory": True}, ValueError, "needs record_trajectory=False"),
    "seed": ({"seed": -1}, ValueError, "seed is -1"),
    "seed text": ({"seed": "a"}, ValueError, "seed is 'a'"),
    "backend": ({"backend": "tpu"}, ValueError, "tpu"),
    "negative token": ({"input_ids": torch.full((1, 12), -3)}, ValueError, r"holds token -3; the model's are in \[0, 97\)"),
    "token looked up": ({"input_ids": torch.full((1, 12), -3), "draft": "lookup"}, ValueError, "holds token -3"),
    "huge token": ({"input_ids": torch.full((1, 12), 2**33), "draft": "lookup"}, ValueError, f"holds token {2**33}"),
    "token behind the last": ({"input_ids": torch.full((1, 12), 97)}, ValueError, "holds token 97"),
    "truths": ({"input_ids": torch.ones((1, 12), dtype=torch.bool)}, ValueError, "prompt is torch.bool; it must be int64"),
    "bytes": ({"input_ids": torch.ones((1, 12), dtype=torch.uint8)}, ValueError, "prompt is torch.uint8; it must be int64"),
    "numbers": ({"input_ids": torch.ones(1, 12)}, ValueError, "prompt is torch.float32; it must be int64"),
    "unknown": ({"blocksize": 3}, ValueError, "blocksize"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case, model, inputs):
    options, error, message = REFUSED[case]
    before = snapshot(model)
    calls = []
    model.model.embed_tokens.register_forward_hook(lambda *args: calls.append(1))
    streamer = Recorder()
    with pytest.raises(error, match=message):
        JacobiGenerator(model).generate(**(inputs | GREEDY | {"streamer": streamer} | options))
    assert not calls and not streamer.values
    assert snapshot(model) == before


def test_empty_prompts_are_refused(model):
    for shape in ((1, 0), (0, 4), (4,)):
        with pytest.raises(ValueError, match="prompt has shape"):
            JacobiGenerator(model).generate(torch.zeros(shape, dtype=torch.int64), **GREEDY)
    with pytest.raises(ValueError, match="prompt has shape None"):
        JacobiGenerator(model).generate(**GREEDY)


def test_a_streamer_takes_one_row(model):
    with pytest.raises(ValueError, match="3 rows"):
        JacobiGenerator(model).generate(**make_prompts(3), **GREEDY, streamer=Recorder())


def test_decoding_must_be_known(model, inputs):
    with pytest.raises(ValueError, match="'beam'"):
        enable_jacobi(model).generate(**inputs, decoding="beam")


_SMALL = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2)
_HEADS = dict(decoder_attention_heads=2, encoder_attention_heads=2, decoder_ffn_dim=32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=32, d_ff=32, num_layers=1, num_heads=2)),
            "encoder-decoder",
        ),
        (lambda: MambaForCausalLM(MambaConfig(**_SMALL, state_size=4)), "cannot roll back"),
        (lambda: BartForCausalLM(BartConfig(vocab_size=50, d_model=32, decoder_layers=1, **_HEADS)), "mask itself"),
        (lambda: PLBartForCausalLM(PLBartConfig(vocab_size=50, d_model=32, decoder_layers=1, **_HEADS)), "mask itself"),
        (lambda: DogeForCausalLM(DogeConfig(**_SMALL, num_attention_heads=2, intermediate_size=32)), "mask itself"),
        (lambda: BloomForCausalLM(BloomConfig(**_SMALL, n_head=2)), "attention interface"),
    ],
)
def test_models_that_cannot_be_decoded_are_refused(make, message):
    model = make()
    before, calls = snapshot(model), []
    model.get_input_embeddings().register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(NotImplementedError, match=message):
        JacobiGenerator(model).generate(torch.tensor([[3, 4]]), **GREEDY)
    assert snapshot(model) == before and not calls


def test_other_things_than_causal_models_are_refused():
    with pytest.raises(TypeError, match="Linear"):
        JacobiGenerator(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="float64"):
        JacobiGenerator(make_model(dtype=torch.float64))
    bert = BertModel(BertConfig(**_SMALL, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(TypeError, match="BertModel"):
        JacobiGenerator(bert)


def test_nan_logits_raise_and_leave_the_model_as_it_was(model, inputs):
    with torch.no_grad():
        model.lm_head.weight[7, 0] = float("nan")
    before = snapshot(model)
    streamer = Recorder()
    with pytest.raises(ValueError, match="NaN"):
        JacobiGenerator(model).generate(**inputs, **GREEDY, streamer=streamer)
    assert snapshot(model) == before
    assert streamer.ended == 1  # nobody waits for more


def test_jacobi_generate_called_by_itself_says_how_to_call_it(model, inputs):
    with pytest.raises(ValueError, match="custom_generate"):
        jacobi_generate(model, inputs["input_ids"])


def test_longrope_stays_within_its_short_positions():
    rope = dict(
        rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=32, factor=8.0,
        short_factor=[1.0] * 8, long_factor=[1 + 0.3 * k for k in range(8)],
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rope_parameters=rope, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(3)
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(3, 97, (1, 20))
    generator = JacobiGenerator(model, JacobiConfig(16))
    want = model.generate(prompt, do_sample=False, max_new_tokens=12)
    assert torch.equal(generator.generate(prompt, do_sample=False, max_new_tokens=12), want)
    with pytest.raises(NotImplementedError, match="beyond 32 positions"):
        generator.generate(prompt, do_sample=False, max_new_tokens=13)


def test_threads_take_turns_on_a_model():
    """A second decode begins in the midst of the first, and ends behind it."""
    model, inputs = make_model("llama", seed=3), make_prompts(1)
    options = dict(do_sample=False, max_new_tokens=24)
    want, attention = model.generate(**inputs, **options), model.config._attn_implementation
    first, second = (JacobiGenerator(model, JacobiConfig(size)) for size in (4, 8))
    other = []
    with futures.ThreadPoolExecutor(1) as pool:

        def meanwhile(tokens):
            if not other:
                other.append(pool.submit(second.generate, **inputs, **options))
                assert not futures.wait(other, timeout=1).done  # it takes a hundredth of that

        got = first.generate(**inputs, **options, on_commit=meanwhile)
        assert torch.equal(got, want) and torch.equal(other[0].result(), want)
    assert model.config._attn_implementation == attention
    assert torch.equal(model.generate(**inputs, **options), want)


def test_scores_are_ordinary_tensors():
    output = JacobiGenerator(make_model("llama"), JacobiConfig(6)).generate(
        **make_prompts(1), do_sample=False, max_new_tokens=4, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert not any(tensor.is_inference() for tensor in (*output.scores, *output.logits, output.sequences))


def use(how, model, ids):
    """What others may do with a model between two steps of its decode; the logits of the last position."""
    if how == "copy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "generate":
        assert model.generate(ids, do_sample=False, max_new_tokens=3).shape[1] == ids.shape[1] + 3
    elif how == "decode":
        assert JacobiGenerator(model).generate(ids, do_sample=False, max_new_tokens=3).shape[1] == ids.shape[1] + 3
    elif how == "gradients":
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embedded).logits[:, -1]
            (gradient,) = torch.autograd.grad(logits.square().sum(), embedded)
        return logits.detach() + gradient.sum((1, 2))[:, None]
    return model(ids).logits[:, -1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("how", ["call", "copy", "pickle", "generate", "decode", "gradients"])
def test_callbacks_may_use_the_model(how, attention):
    model = make_model("llama", seed=4)
    model.set_attn_implementation(attention)
    ids, options = make_prompts(1)["input_ids"], dict(do_sample=False, max_new_tokens=12, eos_token_id=None)
    generator, seen = JacobiGenerator(model, JacobiConfig(6)), []

    def guide(input_ids, scores):
        scores -= 0.3 * use(how, model, input_ids).roll(5, -1)  # in place
        return scores

    def criterion(input_ids, scores, **kwargs):
        assert use(how, model, input_ids).shape == (1, 97)
        return input_ids[:, -1] % 40 == 39

    class Streamer(BaseStreamer):
        def put(self, value):
            seen.append(use(how, model, value.reshape(1, -1)))

        def end(self):
            pass

    plain, expected = model.generate(ids, **options), snapshot(model)
    for given in ({"logits_processor": [guide]}, {"stopping_criteria": [criterion]}, {"streamer": Streamer()}):
        seen.clear()
        want, logits = model.generate(ids, **options, **given), list(seen)
        seen.clear()
        assert torch.equal(generator.generate(ids, **options, **given), want)
        assert len(seen) == len(logits) and all(torch.equal(one, two) for one, two in zip(seen, logits))
        assert ("logits_processor" in given) == (not torch.equal(want, plain[:, : want.shape[1]]))
        assert snapshot(model) == expected
    commits = []
    generator.generate(ids, **options, on_commit=lambda tokens: commits.append(use(how, model, torch.tensor([tokens]))))
    assert commits and not any("forward" in module.__dict__ for module in model.modules())


def test_callbacks_that_raise_leave_the_model_as_it_was(model, inputs):
    before = snapshot(model)

    def criterion(input_ids, scores, **kwargs):
        assert snapshot(model) == before
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        JacobiGenerator(model).generate(**inputs, **GREEDY, stopping_criteria=[criterion])
    assert snapshot(model) == before and not any("forward" in module.__dict__ for module in model.modules())


def test_stop_strings_are_seen_by_callbacks(model, inputs):
    """Those of the model's configuration are hidden from generate's preparation alone."""
    model.generation_config.stop_strings = ["x"]
    tokenizer = AutoTokenizer.from_pretrained("models/spider-cllm")
    seen = []
    JacobiGenerator(model).generate(
        **inputs, **GREEDY, tokenizer=tokenizer, on_commit=lambda tokens: seen.append(model.generation_config.stop_strings)
    )
    assert seen and all(strings == ["x"] for strings in seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "Falcon"])
def test_under_autocast_output_is_as_exact_as_in_its_dtype(family, dtype):
    """Keys are float32 behind rotary embeddings, values are not."""
    model = make_family(family) if family == "Falcon" else make_model(family, seed=4)
    inputs = make_prompts(3)
    options = dict(do_sample=False, max_new_tokens=24)
    with torch.autocast("cpu", dtype=dtype):
        for optimized in (True, False):
            got = JacobiGenerator(model, JacobiConfig(6, optimize=optimized)).generate(**inputs, **options)
            assert verify(model, **inputs, output=got, max_new_tokens=24).lossless


def test_training_goes_on_in_the_same_autocast():
    model, inputs = make_model("llama"), make_prompts(1)

    def criterion(input_ids, scores, **kwargs):
        with torch.enable_grad():
            assert model(input_ids).logits.requires_grad
        return False

    with torch.autocast("cpu", dtype=torch.bfloat16):
        generator = JacobiGenerator(model, JacobiConfig(6))
        generator.generate(**inputs, do_sample=False, max_new_tokens=6, stopping_criteria=[criterion])
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_a_callback_may_use_its_own_generator(model, inputs, monkeypatch):
    """Also where a generator keeps its buffers, as it does on GPUs."""
    monkeypatch.setattr(sys.modules["cllm_kernels.integrations.generate"], "may_capture", lambda device, config: True)
    generator = JacobiGenerator(model, JacobiConfig(6))
    want, other = (model.generate(ids, **GREEDY) for ids in (inputs["input_ids"], inputs["input_ids"].flip(1)))
    inner = []

    def again(tokens):
        inner.append(generator.generate(inputs["input_ids"].flip(1), **GREEDY))

    for _ in range(2):
        assert torch.equal(generator.generate(**inputs, **GREEDY, on_commit=again), want)
        assert all(torch.equal(output, other) for output in inner)
    assert len([key for key in generator._memory if key[0] == "session"]) == 1
