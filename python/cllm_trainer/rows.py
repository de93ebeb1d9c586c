"""Rows of training data: the format, its checks, and other projects' formats.

A row is a JSON object, one a line of a JSONL file. A row holds one output with all its blocks:

- ``prompt_ids``: token ids of the prompt;
- ``output_ids``: token ids of the fixed point that decoding reached, EOS included where it was reached;
- ``states``: what Jacobi decoding stood at on its way there, a list of ``[start, drafts]`` in their order: ``start``
  tokens of the output were committed, and ``drafts`` stood at output positions ``start, start + 1, ...``. Rows
  without states train the autoregressive loss alone;
- ``prefix_length``, where it is there: how many tokens the prompt shares with those of other rows at its beginning,
  such as a database's schema. A batch computes what its rows share once.

``collect`` adds what says where a row comes from; the trainer checks it where it is there:

- ``id``: number of the prompt; ``run``: of the run's settings (:func:`cllm_trainer.collect.collect`);
- ``block_size``, ``mode``: as decoded with; ``tokenizer``: :func:`fingerprint` of the tokenizer;
- ``finished``: whether the output ended by itself; ``degenerate``: whether it runs into repetition;
- ``truth_ids``: a ground truth in the output's place, where one is known.
"""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

State = tuple[int, list[int]]

# What reading a row raises where it is not what it must be; infinity is a number in JSON, but no int.
_BROKEN = (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits that two tokenizers share if they have the same tokens under the same ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    text = json.dumps([vocabulary, tokenizer.eos_token_id])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


def _check_row(row: dict) -> None:
    """Raises one of ``_BROKEN`` on what is no row."""
    if not (row["prompt_ids"] and row["output_ids"]):
        raise ValueError("prompt_ids or output_ids is empty")
    if not all(_is_ids(row[key]) for key in ("prompt_ids", "output_ids", "truth_ids") if key in row):
        raise ValueError("prompt_ids, output_ids and truth_ids must be lists of token ids")
    prefix = row.get("prefix_length", 0)
    if type(prefix) is not int or not 0 <= prefix < len(row["prompt_ids"]):
        raise ValueError("prefix_length must be at least 0 and less than the prompt's length")
    for start, drafts in row.get("states", []):
        if type(start) is not int or start < 0 or not drafts or not _is_ids(drafts):
            raise ValueError("a state is [start, drafts] with start >= 0 and drafts, which are token ids")


def read_rows(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, skip_broken: bool = False
) -> list[dict]:
    """Reads training rows: this project's JSONL, or what :func:`from_cllm` and :func:`from_jacobi_forcing` take.

    Args:
        tokenizer: of the model to train. The two other formats need it, to know where an output ends.
        skip_broken: leaves broken lines out, with one warning that counts them, instead of raising.

    Raises:
        ValueError: lines that are no rows; the first is named, all are counted. Or no row is left.
    """
    data = Path(path).read_bytes()
    if data[:1] == b"[":
        eos = _eos(path, tokenizer)
        try:
            entries = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a whole JSON array ({error})") from None
        try:
            numbered = enumerate(from_cllm(entries, eos), 1)
        except _BROKEN as error:
            raise ValueError(f"{path}: not entries of the CLLM format ({type(error).__name__}: {error})") from None
    else:
        numbered = enumerate(data.splitlines(), 1)
    rows, broken = [], []
    for number, row in numbered:
        try:
            row = json.loads(row) if isinstance(row, bytes) else row
            if "complete_training_sequence_ids" in row:
                row = from_jacobi_forcing(row, _eos(path, tokenizer))
            _check_row(row)
        except _BROKEN as error:
            broken.append(f"{path}:{number}: not a training row ({type(error).__name__}: {error})")
        else:
            rows.append(row)
    if broken and not skip_broken:
        raise ValueError(f"{broken[0]}; {len(broken)} of {len(broken) + len(rows)} rows are broken")
    if broken:
        warnings.warn(f"{len(broken)} broken rows left out, the first: {broken[0]}", stacklevel=2)
    if not rows:
        raise ValueError(f"{path}: no rows in this file")
    return rows


def _eos(path: str | Path, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: this format needs a tokenizer that has an EOS token")
    return tokenizer.eos_token_id


def check_rows(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, vocabulary: int, block_size: int | None = None
) -> None:
    """Raises ValueError on a tokenizer that cannot pad, on rows that another tokenizer made, on ids a model with
    ``vocabulary`` tokens does not have, and, if ``block_size`` is given, on rows made with another."""
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token")
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}; they do not belong together"
        )
    own = fingerprint(tokenizer)
    for number, row in enumerate(rows, 1):
        if row.get("tokenizer", own) != own:
            raise ValueError(f"row {number} was made by the tokenizer {row['tokenizer']}; this one is {own}")
        if block_size is not None and row.get("block_size", block_size) != block_size:
            raise ValueError(f"row {number} was made with block_size {row['block_size']}; asked for is {block_size}")
        for ids in (
            row["prompt_ids"],
            row["output_ids"],
            row.get("truth_ids", []),
            *(s[1] for s in row.get("states", [])),
        ):
            if ids and max(ids) >= vocabulary:
                raise ValueError(
                    f"row {number} holds the token {max(ids)}; the model has the tokens 0 to {vocabulary - 1}"
                )


def correct_later(start: int, drafts: list[int], output: list[int], share: float, rng: random.Random) -> State:
    """The paper's augmentation: of the wrong drafts behind the first wrong one, a random ``share`` is set right."""
    right = output[start : start + len(drafts)]
    wrong = [place for place, pair in enumerate(zip(drafts, right, strict=False)) if pair[0] != pair[1]][1:]
    corrected = list(drafts)
    for place in rng.sample(wrong, round(share * len(wrong))):
        corrected[place] = right[place]
    return start, corrected


def blocks_of(row: dict) -> dict[int, list[list[int]]]:
    """The states by block: output positions ``[j * w, (j + 1) * w)`` for w drafts a state, what stood there in turn.

    A state belongs to the block that its first draft stands in; what was committed of the block before it is part of
    it, and what it drafts for later blocks is cut.
    """
    if not row.get("states"):
        return {}
    width = max(len(drafts) for _, drafts in row["states"])
    blocks: dict[int, list[list[int]]] = {}
    for start, drafts in row["states"]:
        first = start // width * width
        block = (row["output_ids"][first:start] + drafts)[:width]
        if len(block) == width:
            blocks.setdefault(first, []).append(block)
    return blocks


def from_cllm(entries: list[dict], eos: int) -> list[dict]:
    """Rows of a cleaned trajectory file of github.com/hao-ai-lab/Consistency_LLM (a JSON array).

    One entry a block there: ``data_id``, ``jacobian_itr_id``, ``prompt_ids`` (prompt and earlier blocks, nested),
    ``answer_trajectory_ids`` (the block's points, the fixed point last), ``teacher_output_ids``,
    ``complete_teacher_output_ids`` and ``labels_ids``. One row a ``data_id`` here, cut behind its first EOS.
    Labels become ``truth_ids`` where they begin with the prompt.
    """
    groups: dict[str, list[dict]] = {}
    for number, entry in enumerate(entries, 1):
        missing = [key for key in ("data_id", "prompt_ids", "answer_trajectory_ids") if key not in entry]
        if missing:
            raise ValueError(f"entry {number} has no {', '.join(missing)}")
        groups.setdefault(entry["data_id"], []).append(entry)
    return [_from_cllm_group(group, eos) for group in groups.values()]


def _flat(ids: list) -> list[int]:
    while ids and isinstance(ids[0], list):
        ids = ids[0]
    return ids


def _from_cllm_group(group: list[dict], eos: int) -> dict:
    group = sorted(group, key=lambda entry: len(_flat(entry["prompt_ids"])))
    whole = max((_flat(entry["prompt_ids"]) + entry["answer_trajectory_ids"][-1] for entry in group), key=len)
    whole = max(whole, _flat(group[0].get("complete_teacher_output_ids") or []), key=len)
    lengths = group[0].get("prompt_ids_len")
    first = int(_flat(lengths)[0]) if isinstance(lengths, list) and lengths else len(_flat(group[0]["prompt_ids"]))
    prompt, output = whole[:first], _until(whole[first:], eos)
    width = len(group[0]["answer_trajectory_ids"][-1])
    row = {"prompt_ids": prompt, "output_ids": output, "states": [], "block_size": width + 1, "mode": "block"}
    row |= {"finished": output[-1:] == [eos]}
    for entry in group:
        start = len(_flat(entry["prompt_ids"])) - first
        row["states"] += [(start, drafts) for drafts in entry["answer_trajectory_ids"][:-1] if start < len(output)]
    labels = _flat(group[0].get("labels_ids") or [])
    if len(labels) > first and labels[:first] == prompt:
        row["truth_ids"] = _until(labels[first:], eos)
    return row


def _until(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def to_cllm(rows: Iterable[dict], path: str | Path, pad: int) -> int:
    """Writes rows as :func:`from_cllm` reads them; returns the number of entries.

    Blocks are as wide as the drafts of a state (a window of n tokens holds n - 1), since the token that a window
    starts with is committed. What the last block has behind the output is ``pad``.
    """
    entries = []
    for number, row in enumerate(rows):
        prompt, output = row["prompt_ids"], row["output_ids"]
        for turn, (first, points) in enumerate(sorted(blocks_of(row).items())):
            width = len(points[0])
            fixed = output[first : first + width]
            fixed = fixed + [pad] * (width - len(fixed))
            entry = {
                "data_id": f"data_{number}",
                "jacobian_itr_id": f"itr_{turn}",
                "prompt_ids_len": [len(prompt)],
                "prompt_ids": [prompt + output[:first]],
                "answer_trajectory_ids": [*points, fixed],
                "teacher_output_ids": [prompt + output[:first] + fixed],
                "complete_teacher_output_ids": prompt + output,
            }
            if "truth_ids" in row:
                entry["labels_ids"] = prompt + row["truth_ids"]
            entries.append(entry)
    temporary = Path(f"{path}.part")
    temporary.write_text(json.dumps(entries))
    temporary.replace(path)
    return len(entries)


def from_jacobi_forcing(entry: dict, eos: int) -> dict:
    """The row of a line of a training file of github.com/hao-ai-lab/JacobiForcing.

    ``complete_training_sequence_ids`` holds the prompt of ``prompt_ids_len`` tokens and then, for each of the T
    ``traj_position_indices``, a noisy block and the clean one of the same size.
    """
    sequence, lengths = _flat(entry["complete_training_sequence_ids"]), entry["prompt_ids_len"]
    prompt = int(_flat(lengths)[0]) if isinstance(lengths, list) else int(lengths)
    pairs = len(_flat(entry["traj_position_indices"]))
    width, rest = divmod(len(sequence) - prompt, max(2 * pairs, 1))
    if not pairs or rest or width < 1:
        raise ValueError(f"{len(sequence)} tokens are no prompt of {prompt} and {pairs} pairs of blocks of one size")
    blocks = [sequence[at : at + width] for at in range(prompt, len(sequence), width)]
    output = _until([token for clean in blocks[1::2] for token in clean], eos)
    states = [(at * width, noisy) for at, noisy in enumerate(blocks[::2]) if at * width < len(output)]
    row = {"prompt_ids": sequence[:prompt], "output_ids": output, "states": states, "block_size": width + 1}
    return row | {"mode": "block", "finished": output[-1] == eos}
