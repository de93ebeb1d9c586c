"""A packed batch computes what separate forwards would."""

from __future__ import annotations

import json
import random

import pytest
import torch
import torch.nn.functional as F
from cllm_trainer.losses import losses, target_loss
from cllm_trainer.packing import IGNORE, TrajectoryDataset, additive_mask, collate, dense_mask, next_state
from cllm_trainer.rows import read_rows
from cllm_trainer.train import LengthGroups
from helpers import PAD, make_model

from cllm_kernels import JacobiConfig, JacobiGenerator

ROWS = [
    {"prompt_ids": [5, 6, 7], "output_ids": [8, 9, 10, 11, 1], "states": [[0, [20, 21, 22]], [2, [30, 31, 32, 33, 34]]]},
    {"prompt_ids": [12], "output_ids": [13, 14, 15, 16, 17, 18, 19, 1], "states": [[3, [40, 41]]]},
    {"prompt_ids": [50, 51], "output_ids": [52], "states": [[0, [60, 61]]]},  # its drafts predict behind the end
    {"prompt_ids": [70, 71], "output_ids": [72, 73]},
]


def draw(blocks=2):
    dataset = TrajectoryDataset(ROWS, noisy_blocks=blocks)
    return [dataset[index] for index in range(len(ROWS))]


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_forward_equals_separate_forwards(attention, decay):
    model = make_model()
    features = draw()
    batch = collate(features, PAD)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    inputs["attention_mask"] = additive_mask(dense_mask(batch["seen"], batch["group"]), torch.float32)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        logits = model(**inputs).logits
    flat = logits.flatten(0, 1)
    noisy = []
    consistency, weights, count, entropy, labels = 0.0, 0.0, 0, 0.0, 0
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
            divergence = (target.exp() * (target - block.log_softmax(-1))).sum(-1)
            wrong = [draft != token for draft, token in zip(drafts, tokens[first:], strict=False)]
            distance = 0
            for value, off in zip(divergence, wrong, strict=True):
                distance += bool(distance) or off
                if distance:
                    consistency += decay ** (distance - 1) * value
                    weights += decay ** (distance - 1)
                else:
                    assert abs(value) < 1e-5
            count += len(drafts)
    assert len(batch["student"]) == len(batch["teacher"]) == count == 3 + 2 + 2
    torch.testing.assert_close(flat[batch["student"]], torch.cat(noisy), rtol=1e-4, atol=1e-5)
    ar, kl = losses(logits, *(batch[key] for key in ("labels", "student", "teacher", "distance")), decay)
    torch.testing.assert_close(ar, entropy / labels, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl, consistency / weights, rtol=1e-4, atol=1e-6)


def test_labels_are_the_output_alone():
    batch = collate(draw(), PAD)
    for index, row in enumerate(ROWS):
        kept = batch["labels"][index][batch["labels"][index] != IGNORE]
        assert kept.tolist() == row["output_ids"]


def test_no_gradient_through_the_teacher():
    logits = torch.randn(1, 4, 7, requires_grad=True)
    labels = torch.full((1, 4), IGNORE)
    labels[0, 3] = 2
    _, consistency = losses(logits, labels, torch.tensor([0]), torch.tensor([1]), torch.tensor([1]))
    consistency.backward()
    assert logits.grad[0, 0].abs().sum() > 0
    assert logits.grad[0, 1:].abs().sum() == 0


def test_target_loss_is_the_mean_over_the_outputs():
    """Against torch's distributions, and without what stands on other positions."""
    labels = collate(draw(), PAD)["labels"]
    logits, reference = torch.randn(2, *labels.shape, 11)
    got = target_loss(logits, reference, labels)
    pairs = [torch.distributions.Categorical(logits=x[labels != IGNORE]) for x in (reference, logits)]
    torch.testing.assert_close(got, torch.distributions.kl_divergence(*pairs).mean())
    logits[labels == IGNORE] = torch.nan
    assert target_loss(logits, reference, labels) == got
    assert target_loss(reference, reference, labels) == 0


def test_pairs_behind_right_drafts_alone_make_no_loss():
    labels = torch.full((1, 4), IGNORE)
    labels[0, 3] = 2
    _, consistency = losses(torch.randn(1, 4, 7), labels, torch.tensor([0]), torch.tensor([1]), torch.tensor([0]))
    assert consistency == 0


def test_next_state_is_that_of_the_decoder():
    """A model that knows the output but for one token: its states move as JacobiGenerator moves its window."""
    rng = random.Random(0)
    row = {"prompt_ids": [5, 6, 7], "output_ids": [10, 11, 12, 13, 14, 15, 16, 17, 1]}
    # committed: 10. Drafts stand for 11, 12, 13, 14; the second is wrong, so 11 and 12 get committed.
    start, drafts = next_state(row, 1, [11, 99, 13, 14], [12, 13, 14, 15], 4, rng)
    assert start == 3
    assert drafts[:3] == [13, 14, 15] and drafts[3] in row["prompt_ids"]
    # none right: one token is committed, whatever the model says
    assert next_state(row, 3, [99, 98], [20, 21], 4, rng)[1][:2] == [20, 21]
    # all right: all of them and the next; every draft is new
    start, drafts = next_state(row, 0, [10, 11], [11, 12], 2, rng)
    assert start == 3 and set(drafts) <= set(row["prompt_ids"])
    # at the end it starts again
    start, drafts = next_state(row, 5, [15, 16, 17], [16, 17, 1], 4, rng)
    assert start == 0 and len(drafts) == 4 and set(drafts) <= set(row["prompt_ids"])


def test_on_policy_states_follow_the_decoder():
    """What training moves on with the decoder's own model are the decoder's windows, but for their new drafts."""
    model = make_model()
    prompt = torch.tensor([[5, 6, 7, 8]])
    generator = JacobiGenerator(model, JacobiConfig(block_size=12))
    sequence = generator.generate(
        input_ids=prompt, do_sample=False, max_new_tokens=40, eos_token_id=96, record_trajectory=True
    )
    trajectory = [state for state in generator.trajectory[0] if state[0] + 12 < 40]
    row = {"prompt_ids": prompt[0].tolist(), "output_ids": sequence[0, 4:].tolist(), "states": trajectory[:1]}
    dataset = TrajectoryDataset([row], noisy_blocks=1, augment=0, on_policy=True)
    compared, drawn, before = 0, 0, 0
    for start, drafts in trajectory:
        drawn += max(0, start - before - 1)  # as many drafts were drawn anew
        before = start
        batch = collate([dataset[0]], PAD)
        ((_, _, now, packed),) = batch["blocks"]
        assert now == start and packed[: 11 - drawn] == drafts[: 11 - drawn]
        compared += max(0, 11 - drawn)
        if drawn >= 11:
            break
        inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
        with torch.no_grad():
            mask = additive_mask(dense_mask(batch["seen"], batch["group"]), torch.float32)
            logits = model(**inputs, attention_mask=mask).logits
        dataset.advance(batch["blocks"], logits.flatten(0, 1)[batch["student"]].argmax(-1).tolist())
    assert compared > 40


def test_states_off_policy_stay():
    dataset = TrajectoryDataset(ROWS[:1], noisy_blocks=2, augment=0)
    before = sorted(dataset[0]["states"])
    batch = collate([dataset[0]], PAD)
    dataset.advance(batch["blocks"], [0] * len(batch["student"]))
    assert sorted(dataset[0]["states"]) == before


def test_batches_hold_one_length_in_no_order():
    rng = random.Random(0)
    lengths = [rng.randrange(20, 200) for _ in range(1003)]
    order = list(LengthGroups(lengths, 8, seed=1))
    assert sorted(order) == list(range(1003))
    batches = [order[at : at + 8] for at in range(0, len(order), 8)]
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 15
    means = [sum(lengths[i] for i in batch) / len(batch) for batch in batches]
    rising = sum(a < b for a, b in zip(means, means[1:], strict=False))
    assert 0.35 < rising / len(means) < 0.65


def test_bundles_share_their_prefix():
    rng = random.Random(0)
    lengths, prefixes = zip(*[(rng.randrange(20, 200), rng.randrange(30)) for _ in range(1000)], strict=True)
    sampler = LengthGroups(lengths, 16, 1, prefixes, together=4)
    orders = []
    for sampler.epoch in range(2):
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(1000))
        batches = [orders[-1][at : at + 16] for at in range(0, 1000, 16)]
        different = sum(len({prefixes[index] for index in batch}) for batch in batches) / len(batches)
        assert different < 6  # four, and what begins in one batch and ends in the next
    assert orders[0] != orders[1]


def test_without_states_there_is_no_consistency_loss():
    batch = collate(draw(blocks=0), PAD)
    assert set(batch) == {"input_ids", "position_ids", "labels", "outputs", "seen", "group"}
    ar, consistency = losses(torch.randn(*batch["labels"].shape, 7), batch["labels"].clamp(max=6))
    assert ar > 0 and consistency == 0


@pytest.mark.parametrize(
    "line",
    ['{"prompt_ids": [1]', '{"prompt_ids": [1]}', '{"prompt_ids": [], "output_ids": [1]}', "[1]",
     '{"prompt_ids": [1, 2], "output_ids": [1], "prefix_length": 2}',
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
