"""Rows of training data, and how a batch of them is packed for one forward.

A row is a JSON object, one a line of a JSONL file:

- ``prompt_ids``: token ids of the prompt;
- ``output_ids``: token ids of the fixed point that decoding reached, EOS included where it was reached;
- ``states``: what Jacobi decoding stood at on its way there, a list of ``[start, drafts]``: ``start`` tokens
  of the output were committed, and ``drafts`` stood at output positions ``start, start + 1, ...``. Rows
  without states train the autoregressive loss alone.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from torch.utils.data import Dataset

IGNORE = -100  # the label that torch's cross entropy skips


class TrajectoryDataset(Dataset):
    """Rows with ``noisy_blocks`` states drawn anew for every visit.

    Half of the states drawn are augmented as the paper does it: some of their drafts are set right. Each such
    state draws its own share of drafts to set right, so that the model meets every degree of noise.

    Args:
        rows: training rows as the module describes them.
        noisy_blocks: how many states to pack behind each clean sequence; fewer where a row has fewer.
        seed: of the draws.
    """

    def __init__(self, rows: list[dict], noisy_blocks: int = 0, seed: int = 0):
        self.rows = rows
        self.noisy_blocks = noisy_blocks
        self._random = random.Random(seed)

    def _augment(self, state: tuple[int, list[int]], output: list[int]) -> tuple[int, list[int]]:
        if self._random.random() < 0.5:
            return state
        start, drafts = state
        share = self._random.random()
        right = output[start : start + len(drafts)]
        corrected = [new if self._random.random() < share else old for old, new in zip(drafts, right, strict=False)]
        return start, corrected + drafts[len(right) :]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        states = row.get("states", [])
        drawn = self._random.sample(states, min(self.noisy_blocks, len(states)))
        return {
            "input_ids": row["prompt_ids"] + row["output_ids"],
            "prompt_length": len(row["prompt_ids"]),
            "states": [self._augment(state, row["output_ids"]) for state in drawn],
        }


def initial_states(row: dict, block_size: int, rng: random.Random) -> list[tuple[int, list[int]]]:
    """For every start the state in which a block begins: drafts drawn from the prompt. Needs no decoding."""
    return [
        (start, rng.choices(row["prompt_ids"], k=block_size - 1)) for start in range(len(row["output_ids"]) - 1)
    ]


def collate(features: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Packs each feature as ``[clean sequence | noisy block | noisy block ...]`` with shared positions.

    A noisy block of a state with ``start`` committed tokens stands at the positions of the tokens it drafts.
    It sees the clean sequence before those positions and itself causally: what a Jacobi forward sees.
    Drafts whose prediction would fall behind the end of the output are cut.

    Returns:
        ``input_ids``, ``position_ids``, ``labels`` int64 ``[B, T]`` (labels on the clean output only, already
        shifted: ``labels[t]`` is the token that position ``t`` predicts), and, where there is any noisy block,
        ``attention_mask`` bool ``[B, 1, T, T]`` and ``student``, ``teacher`` int64 ``[M]``: indices into the
        flattened ``B * T`` positions whose predictions shall agree.
    """
    layouts = []
    for feature in features:
        clean, prompt = feature["input_ids"], feature["prompt_length"]
        blocks = []
        for start, drafts in feature["states"]:
            first = prompt + start
            drafts = drafts[: max(0, len(clean) - 1 - first)]
            if drafts:
                blocks.append((first, drafts))
        layouts.append((clean, prompt, blocks))
    width = max(len(clean) + sum(len(drafts) for _, drafts in blocks) for clean, _, blocks in layouts)
    shape = (len(layouts), width)
    input_ids = torch.full(shape, pad_token_id)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE)
    batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
    noisy = any(blocks for _, _, blocks in layouts)
    if noisy:
        # Each position sees itself, padding too: a row of the mask without any true value makes NaN.
        mask = torch.eye(width, dtype=torch.bool).repeat(len(layouts), 1, 1)
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        student, teacher = [], []
    for row, (clean, prompt, blocks) in enumerate(layouts):
        end = len(clean)
        input_ids[row, :end] = torch.tensor(clean)
        position_ids[row, :end] = torch.arange(end)
        labels[row, prompt - 1 : end - 1] = torch.tensor(clean[prompt:])
        if noisy:
            mask[row, :end, :end] = causal[:end, :end]
        for first, drafts in blocks:
            size = len(drafts)
            here = slice(end, end + size)
            input_ids[row, here] = torch.tensor(drafts)
            position_ids[row, here] = torch.arange(first, first + size)
            mask[row, here, :first] = True
            mask[row, here, here] = causal[:size, :size]
            student.append(torch.arange(end, end + size) + row * width)
            teacher.append(torch.arange(first, first + size) + row * width)
            end += size
    if noisy:
        batch |= {"attention_mask": mask[:, None], "student": torch.cat(student), "teacher": torch.cat(teacher)}
    return batch


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as what attention adds to its scores. Eager attention would add a bool mask as 0 and 1."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def read_rows(path: str | Path) -> list[dict]:
    """Reads training rows.

    Raises:
        ValueError: a line is not a row as the module describes it; the line is named.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                complete = bool(row["prompt_ids"]) and bool(row["output_ids"])
                complete = complete and all(start >= 0 and len(drafts) > 0 for start, drafts in row.get("states", []))
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: not a training row ({type(error).__name__}: {error})") from None
            if not complete:
                raise ValueError(f"{path}:{number}: a row needs prompt_ids, output_ids and states with drafts, none empty")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows in this file")
    return rows
