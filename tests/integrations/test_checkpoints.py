"""Miniature checkpoints in the layouts of published CLLMs load with plain from_pretrained, and decode exactly.

`cllm/consistency-llm-7b-*` are Llamas saved by transformers 4.3x: Vicuna's with a sentencepiece tokenizer, DeepSeek's
with a byte-level BPE under the name of Llama's tokenizer. `JacobiForcing/*` are Qwen2 models saved by a trainer that
writes `.bin` files and leaves `use_cache` off. What they hold is read off their training code
(hao-ai-lab/Consistency_LLM, hao-ai-lab/JacobiForcing), not off the checkpoints, which are 7 B parameters.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cllm_kernels import JacobiConfig, JacobiGenerator, enable_jacobi, verify

TEXTS = ["select count ( * ) from wine where grape = 'Zinfandel'", "What is 17 plus 25? Let us see.", "def add(a, b):"]
PROMPT = "select name from wine"

_SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
LLAMA = _SIZES | dict(
    _name_or_path="vicuna-7b-sharegpt-gpt4-48k",
    architectures=["LlamaForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    hidden_act="silu",
    max_position_embeddings=2048,
    model_type="llama",
    num_key_value_heads=4,
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.36.2",
    use_cache=True,
)
QWEN2 = _SIZES | dict(
    _name_or_path="Qwen/Qwen2.5-Coder-7B-Instruct",
    architectures=["Qwen2ForCausalLM"],
    attention_dropout=0.0,
    hidden_act="silu",
    max_position_embeddings=2048,
    max_window_layers=28,
    model_type="qwen2",
    num_key_value_heads=1,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=1000000.0,
    sliding_window=None,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    transformers_version="4.52.4",
    use_cache=False,
    use_sliding_window=False,
)


def write(path, value):
    path.write_text(json.dumps(value, indent=2))


def weights(config):
    """Random tensors under the names and shapes that such a checkpoint has."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]

    def random(*shape):
        return (torch.randn(shape, generator=generator) * 0.3).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": random(config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        for part, rows in (("q", hidden), ("k", keys), ("v", keys)):
            tensors[f"{name}self_attn.{part}_proj.weight"] = random(rows, hidden)
            if config["model_type"] == "qwen2":
                tensors[f"{name}self_attn.{part}_proj.bias"] = random(rows)
        tensors[f"{name}self_attn.o_proj.weight"] = random(hidden, hidden)
        if config["model_type"] == "llama":  # a buffer that early releases wrote
            tensors[f"{name}self_attn.rotary_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, head, 2) / head)
        tensors[f"{name}mlp.gate_proj.weight"] = random(inner, hidden)
        tensors[f"{name}mlp.up_proj.weight"] = random(inner, hidden)
        tensors[f"{name}mlp.down_proj.weight"] = random(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    tensors["lm_head.weight"] = random(config["vocab_size"], hidden)
    return tensors


def write_model(folder, config, kind):
    """config.json, and three shards with their index."""
    write(folder / "config.json", config)
    prefix, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    items = list(weights(config).items())
    index = {"metadata": {"total_size": sum(value.nbytes for _, value in items)}, "weight_map": {}}
    size = math.ceil(len(items) / 3)
    for shard in range(3):
        name = f"{prefix}-{shard + 1:05d}-of-00003.{suffix}"
        part = dict(items[shard * size : (shard + 1) * size])
        if kind == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
        index["weight_map"] |= dict.fromkeys(part, name)
    write(folder / f"{prefix}.{suffix}.index.json", index)


def added(content, special=True):
    return dict(content=content, lstrip=False, normalized=False, rstrip=False, single_word=False, special=special)


def named(content):
    """As releases around 4.33 wrote tokens into tokenizer_config.json."""
    return added(content) | {"__type": "AddedToken"}


def sentencepiece_tokenizer(folder, fast):
    """Vicuna's: tokenizer.model, and with `fast` the tokenizer.json that was converted from it."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=330, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    tokens = dict(bos_token=added("<s>"), eos_token=added("</s>"), pad_token="<unk>", unk_token=added("<unk>"))
    write(folder / "special_tokens_map.json", tokens)
    write(
        folder / "tokenizer_config.json",
        dict(
            bos_token="<s>", eos_token="</s>", pad_token="<unk>", unk_token="<unk>",
            add_bos_token=True, add_eos_token=False, clean_up_tokenization_spaces=False, legacy=False,
            model_max_length=2048, padding_side="right", sp_model_kwargs={}, tokenizer_class="LlamaTokenizer",
            added_tokens_decoder={str(i): added(token) for i, token in enumerate(("<unk>", "<s>", "</s>"))},
        ),
    )  # fmt: skip
    if fast:
        AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer.model").unlink()
    return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size() if not fast else 330


def byte_level(special):
    """A small byte-level BPE; `special` tokens stand behind its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


def deepseek_tokenizer(folder):
    special = ["<|begin_of_sentence|>", "<|end_of_sentence|>"]
    tokenizer = byte_level(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    start = tokenizer.token_to_id(special[0])
    write(
        folder / "tokenizer_config.json",
        dict(
            bos_token=named(special[0]), eos_token=named(special[1]), pad_token=named(special[1]), unk_token=None,
            add_bos_token=True, add_eos_token=False, clean_up_tokenization_spaces=False, legacy=True, model_max_length=4096,
            sp_model_kwargs={}, tokenizer_class="LlamaTokenizerFast",
            added_tokens_decoder={str(start + i): added(token) for i, token in enumerate(special)},
        ),
    )  # fmt: skip
    return tokenizer.get_vocab_size()


def qwen2_tokenizer(folder, fast):
    """vocab.json and merges.txt, as `use_fast=False` leaves them; with `fast` tokenizer.json too."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(special)
    inner = json.loads(tokenizer.to_str())["model"]
    write(folder / "vocab.json", inner["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in inner["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    ids = {token: tokenizer.token_to_id(token) for token in special}
    write(folder / "added_tokens.json", ids)
    tokens = dict(eos_token=added("<|im_end|>"), pad_token=added("<|endoftext|>"))
    write(folder / "special_tokens_map.json", tokens | dict(additional_special_tokens=special[1:]))
    write(
        folder / "tokenizer_config.json",
        dict(
            add_bos_token=False, add_prefix_space=False, additional_special_tokens=special[1:], bos_token=None,
            added_tokens_decoder={str(value): added(token) for token, value in ids.items()}, unk_token=None,
            clean_up_tokenization_spaces=False, eos_token="<|im_end|>", errors="replace", model_max_length=131072,
            pad_token="<|endoftext|>", padding_side="right", split_special_tokens=False,
            tokenizer_class="Qwen2Tokenizer",
            chat_template="{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ),
    )  # fmt: skip
    if fast:
        tokenizer.save(str(folder / "tokenizer.json"))
    return ids, tokenizer.get_vocab_size()


def sharegpt(folder, fast=False):
    vocabulary = sentencepiece_tokenizer(folder, fast)
    config = LLAMA | dict(vocab_size=max(vocabulary, 336), bos_token_id=1, eos_token_id=2, pad_token_id=0)
    write_model(folder, config, "safetensors")
    # Vicuna's sampling options, which greedy decoding must leave alone
    write(
        folder / "generation_config.json",
        dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_length=4096, temperature=0.9, top_p=0.6),
    )


def sharegpt_fast(folder):
    sharegpt(folder, fast=True)


def spider(folder):
    size = deepseek_tokenizer(folder)
    ids = dict(bos_token_id=size - 2, eos_token_id=size - 1)
    write_model(folder, LLAMA | ids | dict(vocab_size=size + 5), "safetensors")
    write(folder / "generation_config.json", ids | dict(_from_model_config=True, transformers_version="4.36.2"))


def jacobi_forcing(folder, fast=True):
    ids, size = qwen2_tokenizer(folder, fast)
    config = dict(vocab_size=size + 9, bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"])
    write_model(folder, QWEN2 | config | dict(pad_token_id=ids["<|endoftext|>"]), "bin")
    write(
        folder / "generation_config.json",
        dict(
            bos_token_id=ids["<|endoftext|>"], pad_token_id=ids["<|endoftext|>"], do_sample=True, temperature=0.7,
            eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], repetition_penalty=1.1, top_k=20, top_p=0.8,
        ),
    )  # fmt: skip


def jacobi_forcing_slow(folder):
    jacobi_forcing(folder, fast=False)


def jacobi_forcing_without_generation_config(folder):
    jacobi_forcing(folder)
    (folder / "generation_config.json").unlink()


LAYOUTS = [
    sharegpt,
    sharegpt_fast,
    spider,
    jacobi_forcing,
    jacobi_forcing_slow,
    jacobi_forcing_without_generation_config,
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, tmp_path):
    if layout is spider and Version(transformers.__version__) <= Version("5.17.0"):
        pytest.skip(f"transformers {transformers.__version__} splits text for such a tokenizer as Llama's: spaces are lost")
    layout(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer(PROMPT, add_special_tokens=False)["input_ids"]).strip() == PROMPT
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    saved = weights(AutoConfig.from_pretrained(tmp_path).to_dict())
    assert torch.equal(model.lm_head.weight, saved["lm_head.weight"].float())

    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = dict(do_sample=False, max_new_tokens=24)
    for texts in ([PROMPT], [PROMPT, TEXTS[1]]):
        inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        expected = model.generate(**inputs, **options)
        generator = JacobiGenerator(model, JacobiConfig(block_size=6))
        assert torch.equal(generator.generate(**inputs, **options), expected)
        assert verify(model, **inputs, output=expected, **options).exact
        # as the checkpoint's own generation config says, sampling or not
        own = dict(max_new_tokens=24, seed=3)
        drawn = generator.generate(**inputs, **own)
        assert torch.equal(drawn, generator.generate(**inputs, **own, draft="none"))
        assert verify(model, **inputs, output=drawn, **own).exact
    if tokenizer.chat_template:
        message = [{"role": "user", "content": TEXTS[1]}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        expected = model.generate(**inputs, **options)
        assert torch.equal(enable_jacobi(model).generate(**inputs, **options, decoding="jacobi"), expected)


def test_checkpoints_stay_in_their_precision(tmp_path):
    spider(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    inputs = AutoTokenizer.from_pretrained(tmp_path)(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = JacobiGenerator(model, JacobiConfig(block_size=8)).generate(**inputs, do_sample=False, max_new_tokens=24)
    assert verify(model, **inputs, output=output, block_size=8).lossless
