"""Evaluation: methods beside each other, baselines, tables and plots."""

from __future__ import annotations

import json

import pytest
import torch
from cllm_trainer import baselines
from cllm_trainer.baselines import MedusaHeads, distil_draft, make_draft, medusa_generate, train_medusa
from cllm_trainer.evaluate import evaluate, perplexity, tables, write_report
from cllm_trainer.losses import divergence
from cllm_trainer.packing import TrajectoryDataset, collate
from cllm_trainer.plots import classify
from cllm_trainer.tasks import load_task
from helpers import EOS, make_model
from test_collect import make_tokenizer
from test_train import make_rows


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A model that has learnt the rule of test_train's rows."""
    from cllm_trainer.settings import TrainConfig
    from cllm_trainer.train import train

    path = tmp_path_factory.mktemp("evaluate") / "target"
    config = TrainConfig(
        epochs=15, batch_size=10, learning_rate=3e-3, warmup_steps=5, noisy_blocks=0, save_dtype="float32"
    )
    train(make_model(), make_tokenizer(), make_rows(40), path, config)
    return path


def load(path):
    from cllm_kernels.comparison import load_model

    return load_model(path)


def test_medusa_decodes_what_greedy_decoding_does(target, tmp_path):
    model, tokenizer = load(target)
    losses = train_medusa(model, tokenizer, make_rows(40), tmp_path / "heads", count=3, steps=150, learning_rate=3e-3)
    assert losses[-1] < losses[0] / 2
    trained, raw = MedusaHeads.load(tmp_path / "heads"), MedusaHeads(model.config.hidden_size, 3)
    taken = dict.fromkeys((trained, raw), 0)
    for row in make_rows(12, seed=1):
        prompt = torch.tensor([row["prompt_ids"]])
        wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20)
        for heads in taken:
            got, forwards = medusa_generate(model, heads, prompt, 20, [EOS])
            assert got == wanted[0, prompt.shape[1] :].tolist()
            taken[heads] += forwards
    assert taken[trained] < 0.8 * taken[raw]


def test_raw_heads_guess_the_next_token_again(target):
    model, _ = load(target)
    hidden = torch.randn(5, model.config.hidden_size)
    assert torch.equal(MedusaHeads(model.config.hidden_size, 2)(hidden), hidden.expand(2, 5, -1))


def test_the_draft_comes_near_the_target(target, tmp_path):
    model, tokenizer = load(target)
    before = [p.clone() for p in model.parameters()]
    record = distil_draft(model, tokenizer, make_rows(40), tmp_path / "draft", steps=60, learning_rate=3e-3)
    batch = collate([TrajectoryDataset(make_rows(40))[index] for index in range(40)], 0)
    apart = []
    for draft in (make_draft(model), load(tmp_path / "draft")[0]):
        with torch.no_grad():
            logits = [of(batch["input_ids"]).logits[batch["outputs"]] for of in (draft, model)]
        apart.append(divergence(*logits).mean().item())
    assert apart[1] < apart[0] / 2
    assert record["parameters"] < model.num_parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="layers is 2; the target has 2"):
        make_draft(model, 2)


def test_samples_end_with_their_eos(target):
    model, tokenizer = load(target)
    ids, outputs = baselines._samples(model, tokenizer, make_rows(40), 6, seed=0)
    for row, kept in zip(ids.tolist(), outputs.tolist(), strict=True):
        predicted = [token for token, keep in zip(row[1:], kept, strict=False) if keep]
        assert EOS not in predicted[:-1]
        assert predicted[-1] == EOS or len(row) - 1 == max(place for place, keep in enumerate(kept) if keep) + 1


@pytest.fixture(scope="module")
def rows(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    model, tokenizer = load(target)
    train_medusa(model, tokenizer, make_rows(40), folder / "heads", count=3, steps=20)
    distil_draft(model, tokenizer, make_rows(40), folder / "draft", steps=6)
    file = folder / "q.jsonl"
    file.write_text(
        "".join(json.dumps({"turns": [" ".join(f"w{3 + i + j}" for j in range(3))]}) + "\n" for i in range(4))
    )
    task = load_task("mt_bench", file)
    return task, folder, evaluate(
        {"target": target, "cllm": target}, task, 8, 12, lookup=True, draft=folder / "draft", medusa=folder / "heads"
    )  # fmt: skip


def test_methods_stand_beside_each_other(rows):
    task, folder, found = rows
    own = ["hf_ar", "jacobi_window", "jacobi_block"]
    assert [row["method"] for row in found] == [*own, "prompt_lookup", "draft_model", "medusa", *own]
    assert all(row["equal"] == 1 for row in found)
    assert found[0]["tokens_per_forward"] == found[0]["speedup"] == found[0]["speedup_over_target"] == 1
    assert all(row["tokens_per_forward"] >= 1 for row in found)
    ppl = {row["measures"]["perplexity"]["mean"] for row in found}
    assert len(ppl) == 1 and 1 <= ppl.pop() < 100
    write_report(found, task, folder / "out" / "rows.json")
    assert json.loads((folder / "out" / "rows.json").read_text()) == found
    text = (folder / "out" / "rows.md").read_text()
    assert text == tables(found, task) and text.count("\n| ") == 2 + 9 + 4
    assert "| target | medusa | 8 |" in text


def test_perplexity_is_that_of_the_tokens(target):
    model, _ = load(target)
    prompt, tokens = [5, 6, 7], [20, 21, EOS]
    got = perplexity(model, [{"input_ids": torch.tensor([prompt])}], [tokens])
    with torch.no_grad():
        labels = torch.tensor([[-100] * 3 + tokens])
        loss = model(torch.tensor([prompt + tokens]), labels=labels).loss
    assert got == pytest.approx(loss.exp().item(), rel=1e-5)


def test_a_trajectory_in_kinds():
    row = {"output_ids": [10, 11, 12, 13, 14], "states": [[0, [10, 0, 12, 0]], [2, [12, 0, 14]], [4, [14]]]}
    assert classify(row) == [
        ["fast-forwarded", "wrong", "stationary", "wrong", ""],
        ["committed", "committed", "fast-forwarded", "wrong", "stationary"],
        ["committed"] * 4 + ["fast-forwarded"],
        ["committed"] * 5,
    ]


def test_plots_are_drawn(rows, target, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    from cllm_trainer.plots import plot_training, plot_trajectory

    record = json.loads((target / "training_record.json").read_text())
    record["probes"] = [{"step": 1, "tokens_per_forward": 1.0}, {"step": 9, "tokens_per_forward": 2.0}]
    plot_training(record, tmp_path / "a.png")
    plot_trajectory(make_rows(1)[0], tmp_path / "b.png")
    for name in ("a", "b"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_command_line(target, tmp_path):
    """From prompts to the report with all baselines."""
    from cllm_trainer.cli import app
    from typer.testing import CliRunner

    prompts = [
        {"prompt": " ".join(f"w{token}" for token in row["prompt_ids"]), "truth": "w5 w6"} for row in make_rows(8)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    turns = [{"turns": [row["prompt"]]} for row in prompts]
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    (tmp_path / "settings.yaml").write_text("epochs: 1\nar_on: truth\nlora_rank: 2\n")

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == code, result.output
        return result.output

    rows, model = tmp_path / "rows.jsonl", tmp_path / "cllm"
    run("collect", "--model", target, "--prompts", tmp_path / "prompts.jsonl", "--output", rows, "--block-size", 6,
        "--max-new-tokens", 12, "--temperature", 0.7, "--augment", "--cllm-json",
        tmp_path / "cleaned.json")  # fmt: skip
    assert json.loads(rows.read_text().splitlines()[0])["truth_ids"] == [5, 6, EOS]
    pytest.importorskip("peft", reason="LoRA needs peft")
    run("train", "--model", target, "--data", tmp_path / "cleaned.json", "--output", model, "--settings",
        tmp_path / "settings.yaml", "--epochs", 2)  # fmt: skip
    config = json.loads((model / "training_record.json").read_text())["config"]
    assert (config["epochs"], config["ar_on"], config["lora_rank"]) == (2, "truth", 2)
    run("draft", "--target", target, "--data", rows, "--output", tmp_path / "draft", "--steps", 2)
    run("medusa", "--target", target, "--data", rows, "--output", tmp_path / "heads", "--steps", 2)
    report = run("evaluate", "--target", target, "--cllm", model, "--questions", tmp_path / "turns.jsonl", "--task",
                 "mt_bench", "--limit", 3, "--block-size", 4, "--max-new-tokens", 12, "--lookup", "--draft",
                 tmp_path / "draft", "--medusa", tmp_path / "heads", "--output", tmp_path / "report.json")  # fmt: skip
    assert "| target | draft_model | 4 |" in report and "3 prompts" in report
    assert (tmp_path / "report.md").exists()
    summary = run("rounds", "--model", target, "--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "rounds",
                  "--count", 1, "--n", 4, "--max-new-tokens", 8, "--epochs", 1, "--no-drop-degenerate")  # fmt: skip
    assert '"round": 1' in summary
    assert "noisy_blocks: 4" in run("settings")
