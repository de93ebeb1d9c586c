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
    """Rows with ``noisy_blocks`` states each, for :func:`collate`.

    Args:
        rows: training rows as the module describes them.
        noisy_blocks: how many states to pack behind each clean sequence; fewer where a row has fewer.
        augment: share of the visits to a state that set some of its drafts right, as the paper does, each a
            share of its own, so that the model meets every degree of noise.
        on_policy: False draws states anew for every visit. True draws them once, and :meth:`advance` moves
            them on: training goes over the trajectories of the model as it now is, kept on the rows' outputs.
        seed: of the draws.
    """

    def __init__(
        self, rows: list[dict], noisy_blocks: int = 0, augment: float = 0.5, on_policy: bool = False, seed: int = 0
    ):
        self.rows = rows
        self.noisy_blocks = noisy_blocks
        self.augment = augment
        self.on_policy = on_policy
        self._random = random.Random(seed)
        self._live = [self._draw(row) for row in rows] if on_policy else []

    def _draw(self, row: dict) -> list[tuple[int, list[int]]]:
        # a draft behind which no token of the output stands predicts nothing
        states = [state for state in row.get("states", []) if state[0] < len(row["output_ids"]) - 1]
        return self._random.sample(states, min(self.noisy_blocks, len(states)))

    def _set_right(self, start: int, drafts: list[int], output: list[int]) -> tuple[int, list[int]]:
        if self._random.random() >= self.augment:
            return start, drafts
        share = self._random.random()
        right = output[start : start + len(drafts)]
        corrected = [new if self._random.random() < share else old for old, new in zip(drafts, right, strict=False)]
        return start, corrected + drafts[len(right) :]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        states = self._live[index] if self.on_policy else self._draw(row)
        return {
            "index": index,
            "input_ids": row["prompt_ids"] + row["output_ids"],
            "prompt_length": len(row["prompt_ids"]),
            "states": [self._set_right(*state, row["output_ids"]) for state in states],
        }

    def advance(self, blocks: list[tuple[int, int, int, list[int]]], predictions: list[int]) -> None:
        """Moves on-policy states on by one Jacobi iteration; does nothing without ``on_policy``.

        A state that reaches the end of its output starts again at its beginning.

        Args:
            blocks: as :func:`collate` packed them.
            predictions: the model's, for the drafts of all blocks in turn.
        """
        if not self.on_policy:
            return
        first = 0
        for index, slot, start, drafts in blocks:
            row = self.rows[index]
            predicted = predictions[first : first + len(drafts)]
            first += len(drafts)
            window = len(self._live[index][slot][1])
            self._live[index][slot] = next_state(row, start, drafts, predicted, window, self._random)


def next_state(
    row: dict, start: int, drafts: list[int], predicted: list[int], window: int, rng: random.Random
) -> tuple[int, list[int]]:
    """The state that follows on the way to ``row``'s output, with ``window`` drafts.

    ``predicted[i]`` is what a model predicts behind ``drafts[i]``. One token more than the right drafts is
    committed, from the output and not from the prediction, so that the state stays on the row's trajectory. New drafts
    are drawn from the prompt.
    """
    output = row["output_ids"]
    right = 0
    while right < len(drafts) and drafts[right] == output[start + right]:
        right += 1
    start += right + 1
    if start >= len(output) - 1:
        start, predicted, right = 0, [], 0
    kept = predicted[right:]
    return start, kept + rng.choices(row["prompt_ids"], k=window - len(kept))


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
        ``attention_mask`` bool ``[B, 1, T, T]``, ``student`` and ``teacher`` int64 ``[M]``: indices into the
        flattened ``B * T`` positions whose predictions shall agree, ``distance`` int64 ``[M]``: 1 at the first wrong
        draft of a block, one more at each draft behind it, 0 before it (where the student sees what the teacher
        sees), and ``blocks``, a list with the row's index, the number of the state, ``start`` and the drafts of
        each block, in the order of ``student``.
    """
    layouts, packed = [], []
    for feature in features:
        clean, prompt = feature["input_ids"], feature["prompt_length"]
        blocks = []
        for slot, (start, drafts) in enumerate(feature["states"]):
            first = prompt + start
            drafts = drafts[: max(0, len(clean) - 1 - first)]
            if drafts:
                blocks.append((first, drafts))
                packed.append((feature["index"], slot, start, drafts))
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
        student, teacher, distance = [], [], []
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
            wrong = (torch.tensor(drafts) != torch.tensor(clean[first : first + size])).int()
            distance.append(wrong.cummax(0).values.cumsum(0))
            end += size
    if noisy:
        batch |= {
            "attention_mask": mask[:, None],
            "student": torch.cat(student),
            "teacher": torch.cat(teacher),
            "distance": torch.cat(distance),
            "blocks": packed,
        }
    return batch


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as what attention adds to its scores. Eager attention would add a bool mask as 0 and 1."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
