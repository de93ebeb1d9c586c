"""The recipe of the GSM8K models, a second domain: target from scratch, its trajectories, CLLM.

A model of three million parameters learns the form of the answers and hardly any arithmetic, so these models show what
Jacobi decoding does on prose with numbers in it, and no more. ``cllm-train evaluate --task gsm8k`` evaluates them.
"""

from __future__ import annotations

from pathlib import Path

from cllm_kernels import JacobiConfig
from cllm_kernels.comparison import load_model

from .collect import collect, prompts_of
from .from_scratch import encode, learn_to_copy, make_model, make_tokenizer
from .rows import read_rows
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
    """Trains the CLLM on the target's trajectories on the training questions, which go to ``work``; returns its
    training record."""
    model, tokenizer = load_model(target)
    prompts = prompts_of(tokenizer, GSM8K(Path(data) / "train.jsonl").prompts())
    Path(work).mkdir(parents=True, exist_ok=True)
    path = Path(work) / "training.jsonl"
    config = JacobiConfig(block_size=BLOCK_SIZE)
    summary = collect(model, tokenizer, prompts, path, config, max_new_tokens=MAX_NEW_TOKENS)
    notes = {"start": Path(target).name, "block_size": BLOCK_SIZE, "trajectories": summary}
    return train(model, tokenizer, read_rows(path), output_dir, CLLM_CONFIG, notes)
