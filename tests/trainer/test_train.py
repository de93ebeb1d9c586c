"""Training: chunked losses, schedules, masks, resumption, LoRA, the alarm, settings, two processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F
from cllm_trainer import train as training
from cllm_trainer.losses import (
    SEGMENTS,
    check_head,
    chunked_losses,
    dense_mask,
    divergence,
    head_of,
    hidden_states,
    losses,
    packed_forward,
    target_loss,
)  # fmt: skip
from cllm_trainer.packing import IGNORE, TrajectoryDataset, collate, mask_mod, noise_ratio, scheduled_states
from cllm_trainer.settings import TrainConfig, describe, read_settings
from cllm_trainer.train import Collapsed, train
from helpers import EOS, FAMILIES, PAD, VOCABULARY, make_model
from safetensors.torch import load_file
from test_collect import make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

CONFIG = TrainConfig(
    epochs=3, batch_size=4, learning_rate=1e-3, warmup_steps=2, noisy_blocks=2, save_steps=4, save_dtype="float32"
)


def make_rows(count=20, seed=0, width=5):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(2, 7))]
        output = [(prompt[-1] + 7 * at) % (VOCABULARY - 3) + 3 for at in range(rng.randrange(8, 17))] + [EOS]
        states = []
        for start in range(len(output) - 1):
            right = output[start : start + width]
            drafts = [token if rng.random() < 0.5 else rng.choice(prompt) for token in right]
            states.append([start, drafts + rng.choices(prompt, k=width - len(drafts))])
        rows.append({"prompt_ids": prompt, "output_ids": output, "states": states, "block_size": width + 1})
    return rows


def draw(count=4, **options):
    dataset = TrajectoryDataset(make_rows(), **{"noisy_blocks": 3, "augment": 0, **options})
    return [dataset[index] for index in range(count)]


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunked_losses_are_those_of_whole_logits(family, kind):
    """Values and gradients, with chunks of a few rows, a soft cap, and the KL to a target."""
    batch = collate(draw(), PAD)
    model, target = make_model(family), make_model(family, seed=1)
    for decoder in (model, target):  # logits that are not almost alike
        decoder.get_output_embeddings().weight.data.mul_(20)
    whole = None
    for chunk in (None, 5 * VOCABULARY):
        model.zero_grad()
        hidden = hidden_states(model, batch)
        with torch.no_grad():
            reference = hidden_states(target, batch)
        if chunk is None:
            logits, wanted = head_of(model)(hidden), head_of(target)(reference)
            names = ("labels", "student", "teacher", "distance")
            parts = [
                *losses(logits, *(batch[name] for name in names), 0.8, kind),
                target_loss(logits, wanted, batch["labels"]),
            ]
        else:
            pair = head_of(target), reference[batch["outputs"]]
            parts = chunked_losses(head_of(model), hidden, batch, 0.8, kind, pair, chunk)
        sum(parts).backward()
        result = [*(part.detach() for part in parts), *(p.grad.clone() for p in model.parameters())]
        if whole is None:
            whole = result
            assert all(part > 0.01 for part in parts)
        else:
            for got, wanted in zip(result, whole, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """The most elements that a tensor with the vocabulary as its last dimension has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == VOCABULARY:
                self.elements = max(self.elements, tensor.numel())
        return output


def test_no_whole_logits_exist():
    batch, model = collate(draw(12), PAD), make_model()
    weights = model.lm_head.weight.numel()  # [V, D]; its transpose ends in the vocabulary
    with Largest() as largest, packed_forward(model, chunk=8 * VOCABULARY):
        parts, _ = model(packed=batch)
        parts.sum().backward()
    assert largest.elements <= max(8 * VOCABULARY, weights)
    assert batch["input_ids"].numel() * VOCABULARY > 2 * max(8 * VOCABULARY, weights)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_head_gives_the_models_own_logits(family):
    check_head(make_model(family))


def test_a_head_that_does_something_else_is_refused():
    model = make_model()
    original = model.forward

    def twice(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.forward = twice
    with pytest.raises(NotImplementedError, match="chunked loss"):
        check_head(model)


def test_divergences():
    p, q = torch.randn(2, 5, 11)
    logs = [torch.distributions.Categorical(logits=x) for x in (p, q)]
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(divergence(p, q, "forward"), kl(logs[1], logs[0]))
    torch.testing.assert_close(divergence(p, q, "reverse"), kl(logs[0], logs[1]))
    middle = torch.distributions.Categorical(probs=(logs[0].probs + logs[1].probs) / 2)
    torch.testing.assert_close(divergence(p, q, "jsd"), (kl(logs[0], middle) + kl(logs[1], middle)) / 2)
    assert (divergence(p, q, "jsd") <= math.log(2)).all()


@pytest.mark.parametrize("options", [{}, {"schedule": "cyclic", "chained": True}, {"following": True}])
def test_the_flex_mask_is_the_dense_mask(options):
    from torch.nn.attention.flex_attention import create_mask

    batch = collate(draw(**options), PAD)
    rows, width = batch["seen"].shape
    got = create_mask(mask_mod(batch["seen"], batch["group"]), rows, 1, width, width, device="cpu")
    assert torch.equal(got, dense_mask(batch["seen"], batch["group"]))


def with_prefixes(rows):
    """The rows with prompts that begin alike: one with nothing, two with 3 and 9 tokens."""
    prefixes = [[], [5, 6, 7], list(range(20, 29))]
    return [
        row | {"prompt_ids": prefix + row["prompt_ids"], "prefix_length": len(prefix)}
        for row, prefix in zip(rows, 2 * prefixes, strict=False)
    ]


@pytest.mark.parametrize("options", [{}, {"noisy_blocks": 0}, {"schedule": "random", "chained": True}, {"following": True}])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma2", "mistral"}))  # plain attention
def test_segments_and_shared_prefixes_give_the_loss_of_padded_rows(family, options):
    """Losses, predictions and gradients, with a target."""
    model, target = make_model(family), make_model(family, seed=1)
    whole = None
    for attention in ("eager", "sdpa", SEGMENTS):
        for shared in (False, True):
            rows = with_prefixes(make_rows(6))
            if not shared:
                rows = [row | {"prefix_length": 0} for row in rows]
            dataset = TrajectoryDataset(rows, **{"noisy_blocks": 3, "augment": 0, **options})
            batch = collate([dataset[index] for index in range(6)], PAD)
            assert ("prefix_ids" in batch) == shared
            target.set_attn_implementation(attention)
            model.zero_grad()
            with packed_forward(model, target=target, attention=attention):
                parts, predictions = model(packed=batch | {"predict": True})
            parts.sum().backward()
            result = [parts.detach(), *(p.grad.clone() for p in model.parameters())]
            if predictions is not None:
                result.append(predictions)
            for got, wanted in zip(result, whole or result, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(result[0], (whole or result)[0], rtol=1e-5, atol=1e-5)
            whole = whole or result


def test_segments_refuse_what_they_do_not_know():
    model, batch = make_model("gemma2"), collate(draw(), PAD)
    with packed_forward(model, attention=SEGMENTS), pytest.raises(NotImplementedError, match="softcap; take 'eager'"):
        model(packed=batch)


def test_checkpointing_would_lose_shared_prefixes(tmp_path):
    config = dataclasses.replace(CONFIG, gradient_checkpointing=True, attention="sdpa")
    with pytest.raises(ValueError, match="remove prefix_length"):
        train(make_model(), make_tokenizer(), with_prefixes(make_rows(6)), tmp_path, config)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_loss_of_the_dense_mask(monkeypatch):
    """The forward by FlexAttention uncompiled; a GPU compiles it, and the CPU's has no backward."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    calls = []
    monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda self, training: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: calls.append(1) or flex_attention)
    dataset, model = TrajectoryDataset(with_prefixes(make_rows(6)), noisy_blocks=3), make_model()
    batch = collate([dataset[index] for index in range(6)], PAD)
    parts = {}
    for attention in ("sdpa", "flex_attention"):
        with torch.no_grad(), packed_forward(model, attention=attention):
            parts[attention], _ = model(packed=batch)
    assert len(calls) == 4  # of each layer, for the prefixes and for the rows
    torch.testing.assert_close(*parts.values(), rtol=1e-5, atol=1e-5)


def test_prompt_and_what_is_behind_the_end_make_no_loss():
    """Whatever stands in prompt labels, before the first wrong draft and behind the EOS, nothing of it is counted."""
    batch = collate(draw(len(make_rows())), PAD)
    width = batch["input_ids"].shape[1]
    rows = make_rows()
    for index, row in enumerate(rows):
        prompt, clean = len(row["prompt_ids"]), len(row["prompt_ids"]) + len(row["output_ids"])
        labelled = (batch["labels"][index] != IGNORE).nonzero()[:, 0].tolist()
        assert labelled == list(range(prompt - 1, clean - 1))
        assert batch["labels"][index, clean - 2] == EOS  # the EOS itself is learnt
        assert batch["outputs"][index].nonzero()[:, 0].tolist() == labelled
        mine = batch["student"] // width == index
        teacher = batch["teacher"][mine] % width
        assert (teacher >= prompt).all() and (teacher <= clean - 2).all()
    # up to the EOS, and that included: some pair predicts it
    assert any((batch["input_ids"].flatten()[teacher + 1] == EOS) for teacher in batch["teacher"].tolist())


def test_local_consistency_takes_the_next_state_as_teacher():
    row = {"prompt_ids": [5, 6], "output_ids": [10, 11, 12, 13, 14, 15, EOS],
           "states": [[0, [50, 51, 52, 53]], [2, [60, 61, 62, 63]]]}  # fmt: skip
    dataset = TrajectoryDataset([row], noisy_blocks=2, following=True)
    feature = dataset[0]
    assert sorted(zip(feature["states"], feature["following"], strict=True), key=lambda pair: pair[0][0]) == [
        ([0, [50, 51, 52, 53]], [2, [60, 61, 62, 63]]), ([2, [60, 61, 62, 63]], None),
    ]  # fmt: skip
    feature = {**feature, "states": feature["states"], "following": feature["following"]}
    batch = collate([feature], PAD)
    ids, positions = batch["input_ids"][0], batch["position_ids"][0]
    for student, teacher in zip(batch["student"].tolist(), batch["teacher"].tolist(), strict=True):
        assert positions[student] == positions[teacher]
        if ids[student] in (52, 53):  # where the successor drafts
            assert ids[teacher] == {52: 60, 53: 61}[int(ids[student])]
        else:
            assert teacher < 9  # committed by then, or the last state: the clean sequence


def test_the_truth_takes_the_place_of_the_output_in_the_cross_entropy():
    row = {"prompt_ids": [5, 6], "output_ids": [10, 11, EOS], "states": [[0, [50, 51]]], "truth_ids": [20, 21, 22, EOS]}
    dataset = TrajectoryDataset([row], noisy_blocks=1, augment=0, truths=True)
    batch, model = collate([dataset[0]], PAD), make_model()
    with torch.no_grad(), packed_forward(model):
        parts, _ = model(packed=batch)
        logits = model(torch.tensor([[5, 6, 20, 21, 22, EOS]])).logits[0]
        plain = model(packed=collate([TrajectoryDataset([row], 1, 0)[0]], PAD))[0]
    torch.testing.assert_close(parts[0], F.cross_entropy(logits[1:-1], torch.tensor([20, 21, 22, EOS])))
    torch.testing.assert_close(parts[1], plain[1])


def test_noise_schedules():
    rng = random.Random(0)
    assert [noise_ratio("progressive", at, 5, 2, rng) for at in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [noise_ratio("cyclic", at, 9, 3, rng) for at in range(6)] == [0, 0.5, 1, 0, 0.5, 1]
    assert 0.3 < sum(noise_ratio("random", 0, 5, 2, rng) for _ in range(200)) / 200 < 0.7
    output = list(range(10, 22))
    points = [(first, output[first : first + right] + [0] * (4 - right)) for first in (0, 4, 8) for right in (0, 2, 3)]
    row = {"prompt_ids": [5], "output_ids": output, "states": points}
    chosen = scheduled_states(row, 3, "progressive", 16, rng)
    assert [(first, drafts.count(0)) for first, drafts in chosen] == [(0, 1), (4, 2), (8, 4)]


def test_a_chained_block_sees_the_noisy_ones_before_it():
    output = list(range(10, 22))
    row = {"prompt_ids": [5, 6], "output_ids": output, "states": [(first, [50 + first] * 4) for first in (0, 4, 8)]}
    dataset = TrajectoryDataset([row], 3, 0, schedule="random", chained=True)
    batch, model = collate([dataset[0]], PAD), make_model()
    drafts = [50] * 4 + [54] * 4 + [58] * 3  # the last predicts behind the end
    with torch.no_grad():
        packed = head_of(model)(hidden_states(model, batch)).flatten(0, 1)[batch["student"]]
        alone = model(torch.tensor([[5, 6, *drafts]])).logits[0, 2:]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def run(path, config=CONFIG, rows=None, model=None, **options):
    model = model or make_model()
    return model, train(model, make_tokenizer(), rows or make_rows(), path, config, **options)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("on_policy", [False, True])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, monkeypatch, on_policy):
    config = dataclasses.replace(CONFIG, on_policy=on_policy, probe_steps=3)
    whole, record = run(tmp_path / "whole", config)
    advance, steps = training.ConsistencyTrainer.compute_loss, []

    def fail(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 11:  # behind the checkpoint at step 8, within the second epoch
            raise Interrupted
        return advance(self, *args, **kwargs)

    monkeypatch.setattr(training.ConsistencyTrainer, "compute_loss", fail)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", config)
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "config.json").exists()
    with pytest.raises(ValueError, match="interrupted run"):
        run(tmp_path / "cut", config)
    with pytest.raises(ValueError, match=r"other settings: learning_rate \(0.001, now 0.002\)"):
        run(tmp_path / "cut", dataclasses.replace(config, learning_rate=2e-3), resume=True)
    # half a newer checkpoint, as an interruption leaves it, is not taken
    half = tmp_path / "cut" / "checkpoints" / "checkpoint-10"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    resumed, resumed_record = run(tmp_path / "cut", config, resume=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for key in ("history", "probes", "steps"):
        assert record[key] == resumed_record[key], key
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_an_interrupted_save_does_not_load(tmp_path, monkeypatch):
    run(tmp_path / "m", dataclasses.replace(CONFIG, epochs=1))
    replace = os.replace

    def fail(source, destination):
        if str(destination).endswith("training_record.json"):
            raise Interrupted
        replace(source, destination)

    monkeypatch.setattr(training.os, "replace", fail)
    with pytest.raises(Interrupted):
        run(tmp_path / "m", dataclasses.replace(CONFIG, epochs=1, save_steps=0))
    from transformers import AutoModelForCausalLM

    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_gradient_checkpointing_and_accumulation_change_no_step(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1, save_steps=0)
    plain, _ = run(tmp_path / "a", config)
    recomputed, _ = run(tmp_path / "b", dataclasses.replace(config, gradient_checkpointing=True))
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    _, record = run(tmp_path / "c", dataclasses.replace(config, batch_size=2, accumulate=2))
    assert record["steps"] == 5


def test_bf16_computes_in_bf16(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=1, save_steps=0)
    _, wanted = run(tmp_path / "a", config)
    _, record = run(tmp_path / "b", dataclasses.replace(config, bf16=True))
    for a, b in zip(wanted["history"], record["history"], strict=True):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_lora_trains_adapters_alone_and_saves_a_merged_model(tmp_path):
    pytest.importorskip("peft", reason="LoRA needs peft")
    from cllm_kernels.comparison import load_model

    before = make_model()
    _, record = run(tmp_path / "m", dataclasses.replace(CONFIG, lora_rank=4, learning_rate=1e-2, save_steps=0))
    assert record["trained_parameters"] < record["parameters"] / 2
    assert record["history"][-1]["ar_loss"] < record["history"][0]["ar_loss"]
    model, _ = load_model(tmp_path / "m")
    assert set(model.state_dict()) == set(before.state_dict())
    for name, tensor in model.state_dict().items():
        linear = name.endswith("proj.weight")
        assert torch.equal(tensor, before.state_dict()[name]) != linear, name


def test_the_alarm_stops_where_the_model_forgets(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=40, learning_rate=3e-3, alarm_ar=1.3, save_steps=0)

    rows, model = make_rows(), make_model()
    compute, steps = training.ConsistencyTrainer.compute_loss, []

    def turn(self, *args, **kwargs):  # learns, and then unlearns
        steps.append(1)
        loss = compute(self, *args, **kwargs)
        return loss if len(steps) < 60 else -loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.ConsistencyTrainer, "compute_loss", turn)
        with pytest.raises(Collapsed, match="the AR loss is .* at its lowest"):
            run(tmp_path / "m", config, rows, model)
    assert 60 < len(steps) < 200
    assert not (tmp_path / "m" / "config.json").exists()


def test_the_alarm_stops_where_the_model_repeats_itself(tmp_path):
    rows = make_rows()
    stutter = [{**row, "output_ids": [9] * 30, "states": []} for row in rows]
    for number, row in enumerate(stutter):
        row["prompt_ids"] = rows[number]["prompt_ids"]
    config = dataclasses.replace(CONFIG, epochs=20, learning_rate=1e-2, probe_steps=5, save_steps=0)
    with pytest.raises(Collapsed, match="[0-9]+% of the probed outputs run into repetition, [0-9]+% did at the start"):
        run(tmp_path / "m", config, stutter)


def test_degenerate_rows_are_left_out_and_counted(tmp_path):
    rows = make_rows()
    rows[3]["degenerate"] = rows[7]["degenerate"] = True
    config = dataclasses.replace(CONFIG, epochs=1, save_steps=0)
    assert run(tmp_path / "a", config, rows)[1]["degenerate_rows_left_out"] == 2
    assert run(tmp_path / "b", dataclasses.replace(config, drop_degenerate=False), rows)[1]["rows"] == 20


def test_rows_longer_than_a_sliding_window_are_refused(tmp_path):
    with pytest.raises(ValueError, match="sliding window of 8"):
        run(tmp_path / "m", model=make_model("mistral"))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"learning_rate": -1.0}, "learning_rate is -1.0; it must be at least 0"), ({"augment": 1.5}, "at most 1"),
     ({"schedule": "linear"}, "schedule is 'linear'; it must be one of trajectory"), ({"batch_size": "4"}, "must be int"),
     ({"epochs": True}, "must be float"), ({"chained": True}, "chained=True needs"),
     ({"on_policy": True, "consistency": "local"}, "on_policy=True needs"), ({"learning_rate": math.nan}, "learning_rate is nan")],
)  # fmt: skip
def test_bad_settings_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**change)


def test_settings_from_yaml(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(describe())
    assert read_settings(path) == TrainConfig()
    path.write_text("epochs: 2\nschedule: cyclic\n")
    assert read_settings(path, {"epochs": 3}) == TrainConfig(epochs=3, schedule="cyclic")
    path.write_text("epoch: 2\n")
    with pytest.raises(ValueError, match="no such settings: epoch; there are epochs, batch_size"):
        read_settings(path)
    assert all(field.metadata["source"] for field in dataclasses.fields(TrainConfig))


def launch(log, *command):
    """Runs two processes on the CPU by torchrun, to their end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TRITON_INTERPRET": "0",
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            assert process.wait(timeout=120) == 0, log.read_text()[-3000:]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_two_processes_train_one_model(tmp_path):
    """On the CPU, with a checkpoint on the way."""
    make_model().save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    (tmp_path / "s.yaml").write_text("epochs: 1\nbatch_size: 2\nwarmup_steps: 1\nsave_steps: 2\nsave_dtype: float32\n")
    launch(tmp_path / "log", "-m", "cllm_trainer", "train", "--model", tmp_path / "start", "--data",
           tmp_path / "rows.jsonl", "--output", tmp_path / "m", "--settings", tmp_path / "s.yaml")  # fmt: skip
    record = json.loads((tmp_path / "m" / "training_record.json").read_text())
    assert record["processes"] == 2 and record["steps"] == 5 and record["distributed"] == "MULTI_CPU"
    trained, start = load_file(tmp_path / "m" / "model.safetensors"), make_model().state_dict()
    assert set(trained) == set(start)
    assert all(tensor.isfinite().all() and not torch.equal(tensor, start[name]) for name, tensor in trained.items())


SHARDED = """
import torch
from cllm_trainer.losses import packed_forward
from cllm_trainer.packing import collate
from helpers import PAD, make_model
from test_train import draw
from torch.distributed.fsdp import fully_shard

torch.distributed.init_process_group("gloo")
batch = collate(draw(), PAD)
gradients = []
for sharded in (False, True):
    model = make_model()
    with packed_forward(model, chunk=500):
        if sharded:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        parts, _ = model(packed=batch)
        parts.sum().backward()
    gradients.append([p.grad.full_tensor() if sharded else p.grad for p in model.parameters()])
for a, b in zip(*gradients, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
torch.distributed.destroy_process_group()
"""


def test_sharded_weights_give_the_same_gradients(tmp_path):
    """FSDP2 on the CPU, by torch itself: accelerate, which fsdp.yaml is for, shards on GPUs only."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    launch(tmp_path / "log", tmp_path / "sharded.py")


def test_the_fsdp_configuration_is_one():
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(str(files("cllm_trainer") / "fsdp.yaml"))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2


def test_rounds_collect_with_the_student_of_the_round_before(tmp_path, monkeypatch):
    from cllm_trainer import rounds as module

    from cllm_kernels import JacobiConfig

    make_model().save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    prompts = [row["prompt_ids"] for row in make_rows(6)]
    config = dataclasses.replace(CONFIG, epochs=1, save_steps=0, drop_degenerate=False)
    arguments = (tmp_path / "start", prompts, tmp_path / "out", 2, JacobiConfig(block_size=4), config, 10)
    summaries = module.rounds(*arguments)
    assert [summary["round"] for summary in summaries] == [1, 2]
    record = json.loads((tmp_path / "out/round-2/training_record.json").read_text())
    assert record["start"] == str(tmp_path / "out" / "round-1")
    monkeypatch.setattr(module, "train", None)  # nothing is made again
    assert module.rounds(*arguments) == summaries
