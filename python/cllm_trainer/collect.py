"""Collects Jacobi trajectories through JacobiGenerator."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm_kernels import JacobiConfig, JacobiGenerator


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    output: str | Path,
    config: JacobiConfig,
    batch_size: int = 64,
    max_new_tokens: int = 256,
) -> dict:
    """Decodes every prompt greedily and writes one training row each (see :mod:`cllm_trainer.packing`).

    Rows come in order of prompt length, since prompts of a length share a batch. ``output`` appears when all
    of them are written.

    Args:
        prompts: token ids.
        config: block size, mode and draft source that the trajectories come from.

    Returns:
        ``prompts``, ``tokens``, ``tokens_per_forward``, ``unfinished`` (outputs cut at ``max_new_tokens``).
    """
    if not prompts or not all(prompts):
        raise ValueError("no prompts, or an empty one")
    generator = JacobiGenerator(model, config)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    tokens = iterations = unfinished = 0
    temporary = Path(f"{output}.part")
    bar = tqdm(total=len(prompts), unit="prompt", desc="collect")
    with bar, temporary.open("w", encoding="utf-8") as file:
        for first in range(0, len(order), batch_size):
            batch = [prompts[index] for index in order[first : first + batch_size]]
            inputs = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt").to(model.device)
            sequences = generator.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=max_new_tokens,
                record_trajectory=True,
            )
            width = inputs["input_ids"].shape[1]
            run = generator.statistics
            for prompt, sequence, row, states in zip(
                batch, sequences.tolist(), run.rows, generator.trajectory, strict=True
            ):
                line = {
                    "prompt_ids": prompt,
                    "output_ids": sequence[width : width + row.tokens],
                    "states": states,
                    "block_size": config.block_size,
                    "mode": config.mode,
                    "finished": row.stopped_by == "eos",
                }
                file.write(json.dumps(line) + "\n")
                unfinished += row.stopped_by != "eos"
            tokens += run.tokens
            iterations += run.iterations
            bar.update(len(batch))
            bar.set_postfix_str(f"{tokens / iterations:.2f} tokens/forward")
    os.replace(temporary, output)
    return {
        "prompts": len(prompts),
        "tokens": tokens,
        "tokens_per_forward": tokens / iterations,
        "unfinished": unfinished,
    }


def prompts_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of prompts."""
    return tokenizer(texts, return_token_type_ids=False)["input_ids"]


def tqdm_of(items: list, name: str) -> tqdm:
    """A progress bar over prompts, for :func:`cllm_kernels.comparison.compare_models`."""
    return tqdm(items, desc=f"evaluate {name}", unit="prompt")
