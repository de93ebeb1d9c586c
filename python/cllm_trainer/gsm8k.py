"""The recipe of the GSM8K models, a second domain: target from scratch, its answers, CLLM.

A model of three million parameters learns the form of the answers and hardly any arithmetic, so these models show what
Jacobi decoding does on prose with numbers in it, and no more. ``cllm-train evaluate --task gsm8k`` evaluates them.
"""

from __future__ import annotations

from pathlib import Path

from cllm_kernels.comparison import load_model

from .collect import collect_answers, with_first_states
from .from_scratch import encode, learn_to_copy, make_model, make_tokenizer
from .settings import TrainConfig
from .tasks import GSM8K
from .train import train

VOCABULARY = 2048
MAX_NEW_TOKENS = 256
BLOCK_SIZE = 16
TARGET_CONFIG = TrainConfig(
    epochs=5, batch_size=32, learning_rate=1e-3, weight_decay=0.1, warmup_steps=100, noisy_blocks=0, bf16=True
)
CLLM_CONFIG = TrainConfig(
    epochs=1.5, batch_size=8, learning_rate=1e-3, weight_decay=0.1, warmup_steps=100, noisy_blocks=12, augment=0.125,
    on_policy=True, distance_decay=0.8, bf16=True,
)  # fmt: skip


def build_target(data: str | Path, output_dir: str | Path) -> dict:
    """Trains the target on the training questions; returns its training record."""
    task = GSM8K(Path(data) / "train.jsonl")
    prompts, answers = task.prompts(), [row["answer"] for row in task.rows]
    tokenizer = make_tokenizer((*prompts, *answers), VOCABULARY, digits=True)
    notes = {"data": {"source": "GSM8K train.jsonl (MIT)", "training_questions": len(prompts)}}
    rows = encode(prompts, answers, tokenizer)
    model = make_model(tokenizer, TARGET_CONFIG.seed)
    notes["copying"] = learn_to_copy(model, tokenizer)
    return train(model, tokenizer, rows, output_dir, TARGET_CONFIG, notes)


def build_cllm(data: str | Path, target: str | Path, output_dir: str | Path, work: str | Path) -> dict:
    """Trains the CLLM on the target's own answers to the training questions, which go to ``work/answers.jsonl``;
    returns its training record."""
    model, tokenizer = load_model(target)
    prompts = GSM8K(Path(data) / "train.jsonl").prompts()
    answers, summary = collect_answers(model, tokenizer, prompts, Path(work) / "answers.jsonl", MAX_NEW_TOKENS)
    notes = {"start": Path(target).name, "answers": summary}
    return train(model, tokenizer, with_first_states(answers, BLOCK_SIZE), output_dir, CLLM_CONFIG, notes)
