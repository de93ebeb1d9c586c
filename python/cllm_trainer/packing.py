"""What of a training row is shown at a visit, and how a batch is packed for one forward (rows: cllm_trainer.rows)."""

from __future__ import annotations

import random

import torch
from torch.utils.data import Dataset

from .rows import State, blocks_of

IGNORE = -100  # the label that torch's cross entropy skips
SCHEDULES = ("trajectory", "random", "progressive", "cyclic")


class TrajectoryDataset(Dataset):
    """Rows with ``noisy_blocks`` states each, for :func:`collate`.

    All draws follow from the seed, the epoch (:meth:`set_epoch`) and the row's index, so that a resumed run makes
    the same ones.

    Args:
        rows: training rows as :mod:`cllm_trainer.rows` describes them.
        noisy_blocks: how many states to pack behind each clean sequence; fewer where a row has fewer.
        augment: share of the visits to a state that set some of its drafts right, as the paper does, each a
            share of its own, so that the model meets every degree of noise.
        on_policy: False draws states anew for every visit. True draws them once, and :meth:`advance` moves
            them on: training goes over the trajectories of the model as it now is, kept on the rows' outputs.
        seed: of the draws.
        schedule: ``"trajectory"`` draws states alike from all of a row's. The others take neighbouring blocks of a
            row, each with the point of its trajectory whose share of wrong drafts is nearest to a noise ratio
            (:func:`noise_ratio`).
        cycle: blocks in which the ratio of ``"cyclic"`` rises from 0 to 1.
        chained: whether a noisy block sees the noisy blocks before it instead of the clean ones; not for
            ``"trajectory"``.
        following: whether to give each state's successor on its trajectory too, for the local consistency loss.
        truths: whether the autoregressive loss is to take ``truth_ids`` where a row has any.
    """

    def __init__(
        self, rows: list[dict], noisy_blocks: int = 0, augment: float = 0.5, on_policy: bool = False, seed: int = 0,
        schedule: str = "trajectory", cycle: int = 16, chained: bool = False, following: bool = False,
        truths: bool = False,
    ):  # fmt: skip
        self.rows = rows
        self.noisy_blocks = noisy_blocks
        self.augment = augment
        self.on_policy = on_policy
        self.schedule = schedule
        self.cycle = cycle
        self.chained = chained
        self.following = following
        self.truths = truths
        self.epoch = 0
        self._seed = seed
        self.live = [self._draw(index, self._rng(index, "start")) for index in range(len(rows))] if on_policy else []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _rng(self, index: int, use: str) -> random.Random:
        return random.Random(f"{self._seed} {self.epoch} {index} {use}")

    def _draw(self, index: int, rng: random.Random) -> list[State]:
        row = self.rows[index]
        if self.schedule != "trajectory":
            return scheduled_states(row, self.noisy_blocks, self.schedule, self.cycle, rng)
        # a draft behind which no token of the output stands predicts nothing
        states = [state for state in row.get("states", []) if state[0] < len(row["output_ids"]) - 1]
        return rng.sample(states, min(self.noisy_blocks, len(states)))

    def _set_right(self, state: State, output: list[int], rng: random.Random) -> State:
        start, drafts = state
        if rng.random() >= self.augment:
            return start, drafts
        share = rng.random()
        right = output[start : start + len(drafts)]
        corrected = [new if rng.random() < share else old for old, new in zip(drafts, right, strict=False)]
        return start, corrected + drafts[len(right) :]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        rng = self._rng(index, "visit")
        states = self.live[index] if self.on_policy else self._draw(index, rng)
        feature = {
            "index": index,
            "input_ids": row["prompt_ids"] + row["output_ids"],
            "prompt_length": len(row["prompt_ids"]),
            "prefix_length": row.get("prefix_length", 0),
            "chained": self.chained,
        }
        if self.truths and "truth_ids" in row:
            feature["truth_ids"] = row["truth_ids"]
        if self.following:
            after = {_key(state): later for state, later in zip(row["states"], row["states"][1:], strict=False)}
            return feature | {"states": states, "following": [after.get(_key(state)) for state in states]}
        return feature | {"states": [self._set_right(state, row["output_ids"], rng) for state in states]}

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
            window = len(self.live[index][slot][1])
            rng = self._rng(index, f"advance {slot}")
            self.live[index][slot] = next_state(row, start, drafts, predicted, window, rng)


def _key(state: State) -> tuple:
    return state[0], tuple(state[1])


def next_state(
    row: dict, start: int, drafts: list[int], predicted: list[int], window: int, rng: random.Random
) -> State:
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


def initial_states(row: dict, block_size: int, rng: random.Random) -> list[State]:
    """For every start the state in which a block begins: drafts drawn from the prompt. Needs no decoding."""
    return [(start, rng.choices(row["prompt_ids"], k=block_size - 1)) for start in range(len(row["output_ids"]) - 1)]


def noise_ratio(schedule: str, block: int, blocks: int, cycle: int, rng: random.Random) -> float:
    """Share of wrong drafts that a schedule wants of the ``block``-th of ``blocks`` blocks (Jacobi Forcing, arXiv
    2512.14681): any (``"random"``), rising from 0 to 1 over the output (``"progressive"``) or anew over every
    ``cycle`` blocks (``"cyclic"``)."""
    if schedule == "random":
        return rng.random()
    if schedule == "cyclic":
        block, blocks = block % cycle, cycle
    return block / max(blocks - 1, 1)


def scheduled_states(row: dict, count: int, schedule: str, cycle: int, rng: random.Random) -> list[State]:
    """Up to ``count`` neighbouring blocks of ``row``, each at the point nearest to its noise ratio."""
    output = row["output_ids"]
    blocks = [(first, points) for first, points in sorted(blocks_of(row).items()) if first < len(output) - 1]
    begin = rng.randint(0, max(len(blocks) - count, 0))
    states = []
    for first, points in blocks[begin : begin + count]:
        width = len(points[0])
        wanted = noise_ratio(schedule, first // width, -(-len(output) // width), cycle, rng)
        right = output[first : first + width]

        def gap(point: list[int], right: list[int] = right, wanted: float = wanted) -> float:
            wrong = sum(draft != token for draft, token in zip(point, right, strict=False))
            return abs(wrong / len(right) - wanted)

        states.append((first, min(points, key=gap)))
    return states


def collate(features: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Packs each feature as ``[clean sequence | noisy block | noisy block ...]`` with shared positions.

    A noisy block of a state with ``start`` committed tokens stands at the positions of the tokens it drafts.
    It sees the clean sequence before those positions and itself causally: what a Jacobi forward sees. A chained one
    sees the noisy blocks before it in the place of what they draft. Drafts whose prediction would fall behind the end
    of the output, which its EOS is where it has one, are cut. The successors of states and a ground truth are packed
    like noisy blocks.

    Prompts that begin with the same ``prefix_length`` tokens share these: each such prefix stands in the batch once,
    and apart from the rows, which then hold what follows it alone.

    Returns:
        ``input_ids``, ``position_ids``, ``labels`` int64 ``[B, T]`` (labels on the output only, or on the ground
        truth only, already shifted: ``labels[t]`` is the token that position ``t`` predicts), ``outputs`` bool
        ``[B, T]`` (the positions that predict the output), and ``seen`` and ``group`` int64 ``[B, T]``, what
        :func:`dense_mask` and :func:`mask_mod` make the mask of; the group is -1 in padding.

        Where there is a noisy block, ``student`` and ``teacher`` int64 ``[M]``: indices into the flattened ``B * T``
        positions whose predictions shall agree, ``distance`` int64 ``[M]``: 1 at the first wrong draft of a block, one
        more at each draft behind it, 0 before it (where the student sees what the teacher sees), and ``blocks``, a
        list with the row's index, the number of the state, ``start`` and the drafts of each block, in the order of
        ``student``. Where prompts have prefixes, ``prefix_ids`` int64 ``[P, S]``, padded at their ends,
        ``prefix_lengths`` int64 ``[P]``, and ``prefix_of`` int64 ``[B]``, the prefix of each row.
    """
    prefixes: dict[tuple[int, ...], int] = {}
    prefix_of = []
    for feature in features:
        prefix = tuple(feature["input_ids"][: feature.get("prefix_length", 0)])
        prefix_of.append(prefixes.setdefault(prefix, len(prefixes)))
    layouts, packed = [], []
    for feature in features:
        prefix = feature.get("prefix_length", 0)
        clean, prompt = feature["input_ids"][prefix:], feature["prompt_length"] - prefix
        following = feature.get("following", [None] * len(feature["states"]))
        parts = []  # position, tokens, and of a noisy block the tokens that it drafts and its successor
        for slot, ((start, drafts), later) in enumerate(zip(feature["states"], following, strict=True)):
            first = prompt + start
            drafts = drafts[: max(0, len(clean) - 1 - first)]
            if drafts:
                if later is not None:
                    later = (prompt + later[0], later[1][: max(0, len(clean) - 1 - prompt - later[0])])
                parts.append((first, drafts, later))
                packed.append((feature["index"], slot, start, drafts))
        layouts.append((clean, prompt, parts, feature.get("truth_ids"), feature.get("chained", False)))

    def extent(layout: tuple) -> int:
        clean, _, parts, truth, _ = layout
        return (
            len(clean)
            + len(truth or ())
            + sum(len(drafts) + len(later[1] if later else ()) for _, drafts, later in parts)
        )

    shape = (len(layouts), max(map(extent, layouts)))
    input_ids = torch.full(shape, pad_token_id)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE)
    outputs = torch.zeros(shape, dtype=torch.bool)
    seen = torch.zeros(shape, dtype=torch.int64)
    group = torch.full(shape, -1)
    student, teacher, distance = [], [], []
    width = shape[1]
    for row, (clean, prompt, parts, truth, chained) in enumerate(layouts):
        end = len(clean)
        input_ids[row, :end] = torch.tensor(clean)
        position_ids[row, :end] = torch.arange(end)
        seen[row, :end] = torch.arange(1, end + 1)
        group[row, :end] = 0
        outputs[row, prompt - 1 : end - 1] = True
        groups = 0

        def pack(first: int, tokens: list[int], sees: int, number: int, row: int = row) -> torch.Tensor:
            """Packs tokens at the positions from ``first`` on; returns where they stand."""
            nonlocal end
            here = torch.arange(end, end + len(tokens))
            input_ids[row, here] = torch.tensor(tokens)
            position_ids[row, here] = torch.arange(first, first + len(tokens))
            seen[row, here] = sees
            group[row, here] = number
            end += len(tokens)
            return here

        if truth is None:
            labels[row, prompt - 1 : len(clean) - 1] = torch.tensor(clean[prompt:])
        else:
            groups += 1
            here = pack(prompt, truth, prompt, groups)
            labels[row, prompt - 1] = truth[0]
            labels[row, here[:-1]] = torch.tensor(truth[1:])
        chain = groups + 1
        for first, drafts, later in parts:
            groups += 1
            number, sees = (chain, parts[0][0]) if chained else (groups, first)
            here = pack(first, drafts, sees, number)
            student.append(here + row * width)
            target = torch.arange(first, first + len(drafts))
            if later is not None and later[1]:
                groups += 1
                there = pack(later[0], later[1], later[0], groups)
                covered = (target >= later[0]) & (target < later[0] + len(later[1]))
                target[covered] = there[target[covered] - later[0]]
            teacher.append(target + row * width)
            wrong = (torch.tensor(drafts) != torch.tensor(clean[first : first + len(drafts)])).int()
            distance.append(wrong.cummax(0).values.cumsum(0))
    batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "outputs": outputs}
    batch |= {"seen": seen, "group": group}
    lengths = torch.tensor([len(prefix) for prefix in prefixes])
    if lengths.any():
        prefix_ids = torch.full((len(prefixes), int(lengths.max())), pad_token_id)
        for number, prefix in enumerate(prefixes):
            prefix_ids[number, : len(prefix)] = torch.tensor(prefix)
        batch |= {"prefix_ids": prefix_ids, "prefix_lengths": lengths, "prefix_of": torch.tensor(prefix_of)}
        batch["position_ids"] += lengths[batch["prefix_of"], None]
    if student:
        batch |= {"student": torch.cat(student), "teacher": torch.cat(teacher), "distance": torch.cat(distance)}
        batch["blocks"] = packed
    return batch


def dense_mask(seen: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Bool ``[B, 1, T, T]``: position q sees the first ``seen[q]`` positions, and those of its group up to itself.

    Each position sees itself, padding too: a row of the mask without any true value makes NaN.
    """
    at = torch.arange(seen.shape[1], device=seen.device)
    own = (group[:, :, None] == group[:, None, :]) & (at[:, None] >= at)
    return ((at < seen[:, :, None]) | own)[:, None]


def prefixed_mask(mask: torch.Tensor, prefix_lengths: torch.Tensor, prefix_of: torch.Tensor) -> torch.Tensor:
    """A mask ``[B, 1, T, T]`` with the keys of each row's prefix before it: ``[B, 1, T, S + T]``."""
    width = int(prefix_lengths.max())
    valid = torch.arange(width, device=mask.device) < prefix_lengths[prefix_of, None]
    return torch.cat((valid[:, None, None].expand(-1, 1, mask.shape[2], -1), mask), -1)


def mask_mod(seen: torch.Tensor, group: torch.Tensor, prefix: torch.Tensor | None = None, width: int = 0):
    """:func:`dense_mask` as FlexAttention wants it: a function of batch row, head, query and key.

    With ``prefix``, int64 ``[B]``, that of :func:`prefixed_mask`: ``width`` keys stand before the rows' own, of which
    row ``b`` sees the first ``prefix[b]``.
    """

    def visible(row, head, query, key):
        own = (key - width).clamp(min=0) if prefix is not None else key
        inside = (own < seen[row, query]) | ((group[row, query] == group[row, own]) & (own <= query))
        return inside if prefix is None else torch.where(key < width, key < prefix[row], inside)

    return visible


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as what attention adds to its scores. Eager attention would add a bool mask as 0 and 1."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
