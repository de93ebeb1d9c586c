"""What `cllm-train` says where its input is bad, before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cllm_trainer import cli
from cllm_trainer.baselines import MedusaHeads
from cllm_trainer.settings import TrainConfig, read_settings
from cllm_trainer.set_match import read_schemas
from cllm_trainer.train import Collapsed
from typer.testing import CliRunner

MODELS = Path(__file__).parents[2] / "models"
QUESTION = {"db_id": "wine_1", "question": "How many wines are there?", "query": "select count(*) from wine"}
ROW = {"prompt_ids": [5, 6], "output_ids": [7, 8, 1]}


def refused(*arguments, code=2):
    """The line that says why."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == code and isinstance(result.exception, SystemExit), result.output
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert result.stdout == "" and result.stderr.endswith(line + "\n")
    return line


@pytest.fixture
def files(tmp_path):
    """Options of each command with good files."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "wine"}\n')
    (tmp_path / "questions.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    model, prompts, rows = MODELS / "spider-cllm", tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl"
    return {
        "collect": ["--model", model, "--prompts", prompts, "--output", tmp_path / "new.jsonl"],
        "train": ["--model", model, "--data", rows, "--output", tmp_path / "new"],
        "rounds": ["--model", model, "--prompts", prompts, "--output", tmp_path / "new"],
        "evaluate": ["--target", model, "--questions", tmp_path / "questions.jsonl", "--output", tmp_path / "new.json"],
        "draft": ["--target", model, "--data", rows, "--output", tmp_path / "new"],
        "medusa": ["--target", model, "--data", rows, "--output", tmp_path / "new"],
        "spider": ["--data", tmp_path / "nowhere"],
        "gsm8k": ["--data", tmp_path / "nowhere"],
    }


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    for name in ("_train", "distil_draft", "train_medusa", "_rounds"):
        monkeypatch.setattr(cli, name, lambda *arguments, **options: pytest.fail("work was done"))
    for module in ("cllm_trainer.collect.JacobiGenerator.generate", "cllm_trainer.evaluate.take_turns"):
        monkeypatch.setattr(module, lambda *arguments, **options: pytest.fail("work was done"))


@pytest.mark.parametrize("command", ["collect", "train", "rounds", "evaluate", "draft", "medusa", "spider", "gsm8k"])
def test_files_that_are_not_there(files, tmp_path, command):
    names = {"collect": ["--model", "--prompts"], "train": ["--model", "--data", "--settings"], "spider": ["--data"],
             "rounds": ["--model", "--prompts"], "evaluate": ["--target", "--questions", "--cllm", "--schemas", "--medusa"],
             "gsm8k": ["--data"]}.get(command, ["--target", "--data"])  # fmt: skip
    for name in names:
        assert "nowhere" in refused(command, *files[command], name, tmp_path / "nowhere")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["collect", "train", "rounds", "evaluate", "draft", "medusa", "spider", "gsm8k"])
def test_outputs_that_cannot_be_written(files, tmp_path, command):
    file = tmp_path / "rows.jsonl"
    assert str(file) in refused(command, *files[command], "--output", file / "x")
    makes_folders = command not in ("collect", "medusa", "evaluate")
    assert str(tmp_path) in refused(command, *files[command], "--output", file if makes_folders else tmp_path)
    if command in ("collect", "medusa"):
        assert "no folder" in refused(command, *files[command], "--output", tmp_path / "nowhere" / "x")
    assert json.loads(file.read_text()) == ROW


def test_what_is_read_is_not_written_over(files, tmp_path):
    prompts, questions = tmp_path / "prompts.jsonl", tmp_path / "questions.jsonl"
    before = prompts.read_text(), questions.read_text()
    assert "over" in refused("collect", *files["collect"], "--output", prompts)
    assert "over" in refused("collect", *files["collect"], "--cllm-json", prompts)
    assert "over" in refused("collect", *files["collect"], "--cllm-json", tmp_path / "new.jsonl")
    assert "over" in refused("evaluate", *files["evaluate"], "--output", questions)
    assert "over" in refused("evaluate", *files["evaluate"], "--output", tmp_path / "new.md")  # the tables' file
    assert (prompts.read_text(), questions.read_text()) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no rows"), (b"5\n", ":1: no JSON object"), (b'"prompt"\n', ":1: no JSON object"), (b"\xff\n", ":1: not JSON"),
     (b'{"prompt": 5}\n', ":1: not"), (b'{"prompt": ""}\n', ":1: the prompt has no tokens"), (b'{"x": 1}\n', "no text under"),
     (b'{"prompt": "a"}\n{\n', ":2: not JSON"), (b'{"prompt": "a"}\n{"prompt": "a", "truth": 5}\n', ":2: not"),
     (b'{"prompt": "\\ud800"}\n', ":1: not JSON"), (b'{"prompt": "' + b"x " * 2000 + b'"}\n', "the model has 1024"),
     (b"[" * 100_000, ":1: not JSON")],
)  # fmt: skip
def test_prompts_that_are_none(files, tmp_path, content, message):
    (tmp_path / "prompts.jsonl").write_bytes(content)
    assert message in refused("collect", *files["collect"])
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no rows"), (b"x\n", ":1: not a training row"), (b"5\n", ":1: not a training row"), (b"[1]", "CLLM format"),
     (b"\xff", ":1: not a training row"), (b"[{", "not a whole JSON array"), (b'{"prompt_ids": [1]}\n', "output_ids"),
     (b'[{"data_id": "a", "prompt_ids": [], "answer_trajectory_ids": []}]', "CLLM format"),
     (b'{"prompt_ids": [1, 2], "output_ids": [1], "prefix_length": 0.5}', "prefix_length"),
     (b'{"complete_training_sequence_ids": [], "prompt_ids_len": [], "traj_position_indices": []}', ":1: not a training row"),
     (b'{"complete_training_sequence_ids": [1], "prompt_ids_len": Infinity, "traj_position_indices": [1]}', "OverflowError")],
)  # fmt: skip
def test_rows_that_are_none(files, tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    for command in ("train", "draft", "medusa"):
        assert message in refused(command, *files[command])


def test_tokens_that_the_target_does_not_have(files, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW | {"output_ids": [99999]}) + "\n")
    monkeypatch.undo()
    for command in ("draft", "medusa"):
        assert "token 99999" in refused(command, *files[command])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--nothing", "1", "--nothing"), ("--epochs", "x", "--epochs"), ("--epochs", "inf", "finite"), ("--epochs", "-1", "at least 0"),
     ("--schedule", "x", "one of trajectory"), ("--save-dtype", "int8", "one of bfloat16"), ("--target-weight", "1", "--target"),
     ("--seed", 2**32, "at most")],
)  # fmt: skip
def test_settings_that_are_none(files, option, value, message):
    assert message in refused("train", *files["train"], option, value)


@pytest.mark.parametrize("content", [b"", b"\xff", b"- a", b"a: b", b"{", b"1: 2", b"epochs: x"])
def test_files_of_settings_that_are_none(files, tmp_path, content):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    refused("train", *files["train"], "--settings", path)
    with pytest.raises(ValueError):
        read_settings(path)


@pytest.mark.parametrize("schemas", ["", "5", "[5]", "[{}]", "{}x", '[{"db_id": "wine_1", "table_names_original": ["a"]}]',
    '[{"db_id": "wine_1", "table_names_original": ["a"], "column_names_original": [[0, "x"]], "column_types": []}]'])  # fmt: skip
def test_schemas_that_are_none(files, tmp_path, schemas):
    path = tmp_path / "tables.json"
    path.write_text(schemas)
    assert "no schemas" in refused("evaluate", *files["evaluate"], "--schemas", path)
    with pytest.raises(ValueError, match="no schemas like those"):
        read_schemas(path)


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [("spider", "x", "not JSON"), ("gsm8k", '{"question": "a", "answer": 5}', "no text under answer"),
     ("mt_bench", '{"turns": []}', "turns must be"), ("humaneval", "5", "no JSON object"), ("chess", "5", "must be one of"),
     ("gsm8k", json.dumps({"question": "x " * 2000, "answer": "5"}), "the model has 1024")],
)  # fmt: skip
def test_tasks_that_are_none(files, tmp_path, task, content, message):
    (tmp_path / "questions.jsonl").write_text(content)
    assert message in refused("evaluate", *files["evaluate"], "--task", task)


def test_heads_and_records_that_are_none(files, tmp_path):
    path = tmp_path / "heads.safetensors"
    path.write_bytes(b"x")
    assert "holds no heads" in refused("evaluate", *files["evaluate"], "--medusa", path)
    with pytest.raises(ValueError, match="holds no heads"):
        MedusaHeads.load(MODELS / "spider-cllm" / "model.safetensors")
    (tmp_path / "training_record.json").write_text('{"history": [1.0]}')
    assert "no training to draw" in refused("evaluate", *files["evaluate"], "--plots", "--cllm", tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps(QUESTION) + "\n")
    (tmp_path / "spider-target").mkdir()
    (tmp_path / "spider-target" / "training_record.json").write_text("{}")
    options = ["--data", tmp_path, "--output", tmp_path, "--work", tmp_path]
    assert "no record of" in refused("spider", *options, "--stage", "cllm")
    assert "too few questions" in refused("spider", *options)


def test_an_alarm_is_no_traceback(files, monkeypatch):
    def collapse(*arguments, **options):
        raise Collapsed("step 5: the model forgets")

    monkeypatch.setattr(cli, "_train", collapse)
    assert refused("train", *files["train"], code=1) == "error: step 5: the model forgets"


def test_settings_are_finite():
    with pytest.raises(ValueError, match="learning_rate is inf; it must be finite"):
        TrainConfig(learning_rate=float("inf"))
