"""Evaluates a target and its CLLM side by side on held-out text-to-SQL questions."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from cllm_kernels.comparison import compare

from .collect import load_model


def evaluate(
    models: dict[str, str | Path],
    questions: list[dict],
    block_size: int = 16,
    max_new_tokens: int = 256,
    rounds: int = 1,
) -> list[dict]:
    """Decodes every question by AR and Jacobi with every model, in fp32.

    Args:
        models: name to checkpoint, such as ``{"target": ..., "cllm": ...}``.
        questions: rows with ``db_id``, ``question`` and ``query``.

    Returns:
        The rows of :func:`cllm_kernels.comparison.compare` for each model.
    """
    rows = []
    for name, path in models.items():
        model, tokenizer = load_model(path)
        rows += compare(
            model,
            tokenizer,
            questions,
            name,
            block_size,
            max_new_tokens,
            rounds,
            progress=lambda items, name=name: tqdm(items, desc=f"evaluate {name}", unit="prompt"),
        )
    return rows
