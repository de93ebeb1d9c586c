"""Tokenizers and small models with random weights, which the targets of the recipes start from."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from .settings import TrainConfig
from .train import train

CONTEXT = 1024
COPYING_STEPS = 600
COPYING_CONFIG = TrainConfig(
    epochs=1, batch_size=32, learning_rate=2e-3, weight_decay=0.1, warmup_steps=100, noisy_blocks=0, bf16=True,
    save_dtype="float32",
)  # fmt: skip
ANSWERING_STEPS = 1500
ANSWERING_CONFIG = dataclasses.replace(COPYING_CONFIG, learning_rate=1.5e-3, warmup_steps=50)


def make_tokenizer(texts: Iterable[str], vocabulary: int, digits: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocabulary`` tokens; with ``digits`` every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits:
        pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizer])
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of four layers, 2.9 million parameters and 256 for each token of the vocabulary.

    Half of the first layer's heads begin by looking at the token before: a head that finds what followed a token earlier
    (an induction head, Olsson et al. 2022, arXiv 2209.11895) is built on such ones, and they take longest to appear.
    """
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    _look_back(model)
    return model


@torch.no_grad()
def _look_back(model: LlamaForCausalLM, strength: float = 5.0) -> None:
    """Sets the biases of queries and keys in the first layer so that, after rotation, a query matches the key of the
    position before in each KV head's first query head."""
    attention = model.model.layers[0].self_attn
    half = attention.head_dim // 2
    angles = model.model.rotary_emb.inv_freq[:half]
    heads = model.config.num_attention_heads, attention.head_dim
    queries = attention.q_proj.bias.view(heads)[:: attention.num_key_value_groups]
    keys = attention.k_proj.bias.view(-1, attention.head_dim)
    queries[:, :half], queries[:, half:] = strength, 0.0
    keys[:, :half], keys[:, half:] = strength * angles.cos(), strength * angles.sin()


def copying_rows(count: int, vocabulary: int, eos: int, seed: int = 0) -> list[dict]:
    """Training rows that teach a model to go on as the prompt did earlier: 16 to 48 random tokens, and the first few of
    them again. Some hundred steps on these, and it can use what stands in a prompt; text alone takes far longer."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        tokens = rng.choices(range(2, vocabulary), k=rng.randint(16, 48))
        shown = rng.randint(1, 4)
        rows.append({"prompt_ids": tokens + tokens[:shown], "output_ids": tokens[shown:] + [eos]})
    return rows


def answering_rows(count: int, vocabulary: int, newline: int, eos: int, seed: int = 0) -> list[dict]:
    """Training rows that teach a model to answer as the example does whose question is most alike.

    Each prompt has two examples, a question and an answer of random tokens, and asks one of the two questions again,
    with some tokens left out, some replaced and often its halves exchanged; the output is that one's answer. A quarter
    are :func:`copying_rows`.
    """
    rng = random.Random(seed)
    rows = copying_rows(count // 4, vocabulary, eos, seed)
    while len(rows) < count:
        common = rng.choices(range(2, vocabulary), k=4)  # that all have, as words of one database

        def text(low: int, high: int, common: list[int] = common) -> list[int]:
            return [
                rng.choice(common) if rng.random() < 0.3 else rng.randrange(2, vocabulary)
                for _ in range(rng.randint(low, high))
            ]

        examples = [(text(6, 14), text(6, 24)) for _ in range(2)]
        question, answer = rng.choice(examples)
        asked = [rng.randrange(2, vocabulary) if rng.random() < 0.1 else token for token in question if rng.random() > 0.15]
        if rng.random() < 0.5 and len(asked) > 3:
            turn = rng.randrange(1, len(asked) - 1)
            asked = asked[turn:] + asked[:turn]
        lines = [line for example in examples for line in example] + [asked or question]
        prompt = rng.choices(range(2, vocabulary), k=rng.randint(1, 4))
        for line in lines:
            prompt += [*line, newline]
        rows.append({"prompt_ids": prompt, "output_ids": [*answer, eos]})
    return rows


def learn_to_copy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[dict]:
    """Trains ``model`` in place on :func:`copying_rows`, then on :func:`answering_rows`; returns the records of both."""
    eos = tokenizer.eos_token_id
    (newline,) = tokenizer("\n")["input_ids"]
    batch = COPYING_CONFIG.batch_size
    copying = copying_rows(COPYING_STEPS * batch, len(tokenizer), eos)
    answering = answering_rows(ANSWERING_STEPS * batch, len(tokenizer), newline, eos)
    records = []
    for rows, config in ((copying, COPYING_CONFIG), (answering, ANSWERING_CONFIG)):
        with tempfile.TemporaryDirectory() as folder:
            records.append(train(model, tokenizer, rows, folder, config))
    return records


def encode(
    prompts: list[str], outputs: list[str], tokenizer: PreTrainedTokenizerFast, prefix_lengths: list[int] | None = None
) -> list[dict]:
    """Training rows without states: prompts, how many tokens of each others share, outputs with their EOS."""
    shared = prefix_lengths or [0] * len(prompts)
    encoded = zip(tokenizer(prompts)["input_ids"], shared, tokenizer(outputs)["input_ids"], strict=True)
    return [
        {"prompt_ids": prompt, "prefix_length": length, "output_ids": output + [tokenizer.eos_token_id]}
        for prompt, length, output in encoded
    ]
