"""A packed batch computes what separate forwards would."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from cllm_trainer.packing import IGNORE, TrajectoryDataset, additive_mask, collate, read_rows
from cllm_trainer.train import losses
from helpers import PAD, make_model

ROWS = [
    {"prompt_ids": [5, 6, 7], "output_ids": [8, 9, 10, 11, 1], "states": [[0, [20, 21, 22]], [2, [30, 31, 32, 33, 34]]]},
    {"prompt_ids": [12], "output_ids": [13, 14, 15, 16, 17, 18, 19, 1], "states": [[3, [40, 41]]]},
    {"prompt_ids": [50, 51], "output_ids": [52], "states": [[0, [60, 61]]]},  # its drafts predict behind the end
    {"prompt_ids": [70, 71], "output_ids": [72, 73]},
]


def draw(blocks=2):
    dataset = TrajectoryDataset(ROWS, noisy_blocks=blocks)
    return [dataset[index] for index in range(len(ROWS))]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_forward_equals_separate_forwards(attention):
    model = make_model()
    features = draw()
    batch = collate(features, PAD)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    inputs["attention_mask"] = additive_mask(batch["attention_mask"], torch.float32)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        logits = model(**inputs).logits
    flat = logits.flatten(0, 1)
    noisy = []
    consistency, count, entropy, labels = 0.0, 0, 0.0, 0
    for index, (row, feature) in enumerate(zip(ROWS, features, strict=True)):
        tokens = row["prompt_ids"] + row["output_ids"]
        with torch.no_grad():
            alone = model(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits[index, : len(tokens)], alone, rtol=1e-4, atol=1e-5)
        first_label = len(row["prompt_ids"])
        entropy += F.cross_entropy(alone[first_label - 1 : -1], torch.tensor(tokens[first_label:]), reduction="sum")
        labels += len(row["output_ids"])
        for start, drafts in feature["states"]:
            first = len(row["prompt_ids"]) + start
            drafts = drafts[: len(tokens) - 1 - first]
            if not drafts:
                continue
            with torch.no_grad():
                block = model(torch.tensor([tokens[:first] + drafts])).logits[0, first:]
            noisy.append(block)
            target = alone[first : first + len(drafts)].log_softmax(-1)
            consistency += (target.exp() * (target - block.log_softmax(-1))).sum()
            count += len(drafts)
    assert len(batch["student"]) == len(batch["teacher"]) == count == 3 + 2 + 2
    torch.testing.assert_close(flat[batch["student"]], torch.cat(noisy), rtol=1e-4, atol=1e-5)
    ar, kl = losses(logits, batch["labels"], batch["student"], batch["teacher"])
    torch.testing.assert_close(ar, entropy / labels, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl, consistency / count, rtol=1e-4, atol=1e-6)


def test_labels_are_the_output_alone():
    batch = collate(draw(), PAD)
    for index, row in enumerate(ROWS):
        kept = batch["labels"][index][batch["labels"][index] != IGNORE]
        assert kept.tolist() == row["output_ids"]


def test_no_gradient_through_the_teacher():
    logits = torch.randn(1, 4, 7, requires_grad=True)
    labels = torch.full((1, 4), IGNORE)
    labels[0, 3] = 2
    _, consistency = losses(logits, labels, torch.tensor([0]), torch.tensor([1]))
    consistency.backward()
    assert logits.grad[0, 0].abs().sum() > 0
    assert logits.grad[0, 1:].abs().sum() == 0


def test_without_states_there_is_no_mask_and_no_consistency_loss():
    batch = collate(draw(blocks=0), PAD)
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    ar, consistency = losses(torch.randn(*batch["labels"].shape, 7), batch["labels"].clamp(max=6))
    assert ar > 0 and consistency == 0


@pytest.mark.parametrize(
    "line",
    ['{"prompt_ids": [1]', '{"prompt_ids": [1]}', '{"prompt_ids": [], "output_ids": [1]}', "[1]",
     '{"prompt_ids": [1], "output_ids": [1], "states": [[0, []]]}', '{"prompt_ids": [1], "output_ids": [1], "states": [5]}'],
)  # fmt: skip
def test_broken_rows_are_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="rows.jsonl:2"):
        read_rows(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="no rows"):
        read_rows(path)
