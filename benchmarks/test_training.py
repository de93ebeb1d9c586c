"""What a consistency step costs: beside a plain fine-tuning step on as many tokens, and by attention and precision.

A step is forward, losses and backward. Rounds are interleaved. The original trainer makes three forwards and two backwards of the clean sequences for one
noisy block (github.com/hao-ai-lab/Consistency_LLM, cllm/cllm_trainer_global.py).
"""

import json
import random
import statistics
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cllm_trainer.losses import SEGMENTS, packed_forward
from cllm_trainer.packing import IGNORE, TrajectoryDataset, collate, initial_states
from cllm_trainer.spider import encode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

MODELS = Path(__file__).parents[1] / "models"
ROUNDS = 7
LIMIT = 1.6
SHAPES = {
    "bundled 3M, vocabulary 1024": dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4),
    "5M and vocabulary 32000": dict(hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4, vocab_size=32000),
}  # fmt: skip


def sample(noisy_blocks):
    """The tokenizer, and a dataset of the 48 sample questions with the order of their lengths."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "spider-cllm")
    lines = (MODELS / "spider-cllm" / "held_out_sample.jsonl").read_text().splitlines()
    rows, rng = encode(list(map(json.loads, lines)), tokenizer), random.Random(0)
    for row in rows:
        row["states"] = initial_states(row, 16, rng)
    dataset = TrajectoryDataset(rows, noisy_blocks=noisy_blocks)
    return tokenizer, dataset, sorted(range(len(rows)), key=lambda index: len(dataset[index]["input_ids"]))


def test_attention_and_precision(benchmark):
    """Tokens a second at the recipe's batch, 8 rows with 8 blocks; segments must not cost more than padded rows."""
    tokenizer, dataset, order = sample(noisy_blocks=8)
    batches = [collate([dataset[i] for i in order[at : at + 8]], tokenizer.pad_token_id) for at in range(0, 48, 8)]
    tokens = sum(int((batch["group"] >= 0).sum()) for batch in batches)
    model = LlamaForCausalLM.from_pretrained(MODELS / "spider-target", dtype=torch.float32).train()
    times = {(name, bf16): [] for bf16 in (False, True) for name in ("sdpa", SEGMENTS)}

    def steps(attention, bf16):
        with packed_forward(model, attention=attention):
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = model(packed=batch)[0].sum()
                loss.backward()
                model.zero_grad()

    for _ in range(4):
        for case, taken in times.items():
            begin = time.perf_counter()
            steps(*case)
            taken.append(time.perf_counter() - begin)
    benchmark.pedantic(steps, (SEGMENTS, True), rounds=1)
    speeds = {f"{name}, {'bf16' if bf16 else 'fp32'}": tokens / statistics.median(taken[1:])
              for (name, bf16), taken in times.items()}  # fmt: skip
    benchmark.extra_info.update(speeds)
    print("\n" + ", ".join(f"{name}: {speed:.0f} tokens/s" for name, speed in speeds.items()))
    assert speeds[f"{SEGMENTS}, fp32"] > 0.95 * speeds["sdpa, fp32"]


@pytest.mark.parametrize("shape", SHAPES)
def test_step(shape, benchmark):
    tokenizer, dataset, order = sample(noisy_blocks=4)
    packed = collate([dataset[index] for index in order[16:32]], tokenizer.pad_token_id)  # one length group
    model = LlamaForCausalLM(
        LlamaConfig(**{"vocab_size": len(tokenizer), **SHAPES[shape], "tie_word_embeddings": True})
    )
    model.train()
    tokens = int((packed["group"] >= 0).sum())
    shape_of = packed["input_ids"].shape
    plain = torch.randint(0, model.config.vocab_size, shape_of)
    labels = plain.masked_fill(packed["group"] < 0, IGNORE)

    def backward(loss):
        loss.backward()
        model.zero_grad()

    def fine_tuning():
        backward(model(plain, labels=labels, use_cache=False).loss)

    def consistency():
        backward(model(packed=packed)[0].sum())

    def original():
        for _ in range(2):
            backward(F.cross_entropy(model(plain, use_cache=False).logits.flatten(0, 1), labels.flatten()))
        with torch.no_grad():
            model(plain, use_cache=False)

    times = {function: [] for function in (fine_tuning, consistency, original)}
    with packed_forward(model):
        for _ in range(ROUNDS + 1):
            for function, taken in times.items():
                begin = time.perf_counter()
                function()
                taken.append(time.perf_counter() - begin)
        benchmark.pedantic(consistency, rounds=1)
    medians = {function.__name__: statistics.median(taken[1:]) for function, taken in times.items()}
    ratios = [own / base for own, base in zip(times[consistency][1:], times[fine_tuning][1:], strict=True)]
    benchmark.extra_info.update(medians, tokens=tokens, batch=list(shape_of), ratio=statistics.median(ratios))
    print(f"\n{shape}: {tokens} tokens of {shape_of[0]} x {shape_of[1]}, "
          + ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in medians.items())
          + f", ratio {statistics.median(ratios):.2f}")  # fmt: skip
    assert statistics.median(ratios) <= LIMIT
