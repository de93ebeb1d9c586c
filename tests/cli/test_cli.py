"""The `cllm` command."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cllm_kernels import backends
from cllm_kernels.cli.app import app

MODELS = Path(__file__).parents[2] / "models"
QUESTION = "wine_1 : How many wines are there?\n"
KEYS = {
    "method", "model", "block_size", "prompts", "tokens_per_forward", "tokens_per_second", "speedup", "equal",
    "exact_match", "degenerate",
}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments):
    """The line that says why; the model is not loaded."""
    result = run(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    assert result.stdout == "" and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def no_work(monkeypatch):
    for name in ("app", "bench", "demo"):
        monkeypatch.setattr(f"cllm_kernels.cli.{name}.load_model", lambda *arguments: pytest.fail("a model was loaded"))
    monkeypatch.setattr("cllm_kernels.comparison.load_model", lambda *arguments: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("command", ["generate", "verify"])
@pytest.mark.parametrize(
    ("options", "message"),
    [(["--prompt", "\udcff"], "UTF-8"), (["--dtype", "foo"], "allowed are auto, float32"), (["--device", "foo"], "have cpu"),
     (["--device", "cuda:99"], "have cpu"), (["--block-size", 1], "--block-size"), (["--backend", "foo"], "'torch'"),
     (["--backend", "cuda"], "cuda"), (["--nothing"], "--nothing")],
)  # fmt: skip
def test_bad_options_are_refused_at_once(no_work, monkeypatch, command, options, message):
    if options == ["--backend", "cuda"]:
        monkeypatch.setattr(backends, "_cuda_reason", lambda: "there is no CUDA driver")
    assert message in refused(command, "--model", MODELS / "spider-cllm", "--prompt", "x", *options)


@pytest.mark.parametrize("ids", ["5 x", "-1", "²", str(2**40)])
def test_ids_that_are_none_are_refused_at_once(no_work, ids):
    assert "token ids" in refused("verify", "--model", MODELS / "spider-cllm", "--prompt", "x", "--ids", ids)


@pytest.mark.parametrize("command", [["verify", "--model", MODELS / "spider-cllm", "--prompt", "x"], ["bench"], ["demo"]])
def test_files_that_cannot_be_written_are_refused_at_once(no_work, monkeypatch, tmp_path, command):
    assert f"no folder {tmp_path / 'nowhere'}" in refused(*command, "--json", tmp_path / "nowhere" / "x.json")
    assert "is a folder" in refused(*command, "--json", tmp_path)
    monkeypatch.setattr("os.access", lambda *arguments: False)
    assert "may not be written" in refused(*command, "--json", tmp_path / "x.json")


def test_what_is_read_is_not_written_over(no_work, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("{}")
    assert "over" in refused("demo", "--prompts", path, "--json", tmp_path / "." / "questions.jsonl")
    assert path.read_text() == "{}"


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", b"[]"), ("config.json", b"\xff"), ("model.safetensors", b"x" * 100), ("tokenizer.json", b"{}"),
     ("tokenizer.json", None), ("model.safetensors", None), ("config.json", None)],
)  # fmt: skip
def test_models_that_cannot_be_loaded_are_named(tmp_path, file, content):
    path = tmp_path / "model"
    shutil.copytree(MODELS / "spider-cllm", path)
    (path / file).unlink()
    if content is not None:
        (path / file).write_bytes(content)
    result = run("generate", "--model", path, "--prompt", "x")
    assert result.exit_code == 2 and f"no model can be loaded from {path}: " in result.output, result.output


def test_a_second_model_that_is_none_is_found_before_the_first_one_is_measured(no_work, tmp_path):
    shutil.copytree(MODELS / "spider-target", tmp_path / "spider-target")
    (tmp_path / "spider-cllm").mkdir()
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"db_id": "wine_1", "question": "How many wines are there?", "query": "x"}) + "\n")
    assert "spider-cllm" in refused("demo", "--models", tmp_path, "--prompts", path, "--quiet")
    models = ["--model", f"a={MODELS / 'spider-cllm'}", "--model"]
    assert f"from {tmp_path}" in refused("bench", *models, f"b={tmp_path}")
    assert "one name" in refused("bench", *models, f"a={MODELS / 'spider-target'}")


def test_prompts_that_are_too_long_are_found_before_the_first_one_is_decoded(monkeypatch, tmp_path):
    monkeypatch.setattr("cllm_kernels.comparison.take_turns", lambda *arguments: pytest.fail("decoded"))
    path = tmp_path / "questions.jsonl"
    rows = [{"db_id": "wine_1", "question": question, "query": "x"} for question in ("How many?", "wine " * 1000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("demo", "--models", MODELS, "--prompts", path, "--quiet")
    assert result.exit_code == 2 and "the model has 1024" in result.output
    monkeypatch.setattr("cllm_kernels.cli.bench._peak_memory", lambda *arguments: pytest.fail("decoded"))
    result = run("bench", "--model", MODELS / "spider-cllm", "--max-new-tokens", 1000)
    assert result.exit_code == 2 and "the model has 1024" in result.output


@pytest.mark.parametrize("script", ["steps", "end_to_end"])
def test_benchmarks_refuse_files_that_are_none(monkeypatch, script, tmp_path):
    options = {
        "steps": [["--shape", "spider", "--json", tmp_path / "nowhere" / "x.json"], ["--plot", tmp_path / "x.json"],
                  ["--shape", "spider", "--dtype", "foo"], ["--shape", "x"], ["--shape", "spider", "--device", "foo"]],
        "end_to_end": [[], [tmp_path / "x.json"]],
    }[script]  # fmt: skip
    monkeypatch.syspath_prepend(str(MODELS.parent / "benchmarks"))
    script_app = typer.Typer()
    script_app.command()(importlib.import_module(script).main)
    for own in options:
        result = CliRunner().invoke(script_app, list(map(str, own)))
        assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output


def test_demo_writes_its_rows(tmp_path):
    path = tmp_path / "rows.json"
    result = run("demo", "--models", MODELS, "--limit", 3, "--quiet", "--json", path, "--block-size", 8)
    assert result.exit_code == 0, result.output
    assert "speed-up" in result.output and "Jacobi  " not in result.output
    rows = json.loads(path.read_text())
    assert [(row["model"], row["method"]) for row in rows] == [
        (model, method) for model in ("target", "cllm") for method in ("hf_ar", "jacobi_window", "jacobi_block")
    ]
    for row in rows:
        assert KEYS <= set(row)
        assert row["prompts"] == 3 and row["equal"] == 1.0
        assert row["block_size"] == (1 if row["method"] == "hf_ar" else 8)
        assert row["tokens_per_second"] > 0


def test_demo_shows_other_questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"db_id": "wine_1", "question": "How many wines are there?", "query": "x"}) + "\n")
    result = run("demo", "--models", MODELS, "--prompts", path)
    assert result.exit_code == 0, result.output
    assert "How many wines are there?" in result.output
    assert "same tokens" in result.output and "different tokens" not in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no rows"), ("{}\n", "questions.jsonl:1"), ('{"db_id": 1}\n', "db_id"), ("nonsense\n", "not JSON"),
     ('{"db_id": "a", "question": "b", "query": "c", "examples": ["d"]}\n', "pairs")],  # fmt: skip
)
def test_demo_names_what_is_wrong_with_questions(tmp_path, text, message):
    path = tmp_path / "questions.jsonl"
    path.write_text(text)
    result = run("demo", "--models", MODELS, "--prompts", path, "--quiet")
    assert result.exit_code == 2 and message in result.output


def test_demo_without_models_says_what_it_looks_for(tmp_path):
    result = run("demo", "--models", tmp_path)
    assert result.exit_code == 2 and "spider-target" in result.output


def test_generate():
    result = run("generate", "--model", MODELS / "spider-cllm", "--prompt", "wine_1 : How many wines are there?\n")
    assert result.exit_code == 0, result.output
    assert "select" in result.output and "tokens per forward" in result.output


def test_generate_takes_draft_options():
    prompt = ["--prompt", "wine_1 : How many wines are there?\n", "--dtype", "float32", "--block-size", 4]
    options = ["--draft", "lookup", "--candidates", 2, "--blocks", 2]
    result = run("generate", "--model", MODELS / "spider-cllm", *prompt, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == run("generate", "--model", MODELS / "spider-cllm", *prompt).stdout
    assert "windows chosen" in result.output
    result = run("generate", "--model", MODELS / "spider-cllm", *prompt, "--mode", "block", "--blocks", 2)
    assert result.exit_code == 2 and "needs mode='window'" in " ".join(result.output.split())


def test_generate_reports_errors():
    result = run("generate", "--model", MODELS / "spider-cllm", "--prompt", "x", "--mode", "warp")
    assert result.exit_code == 2 and "window, block" in result.output
    result = run("generate", "--model", MODELS / "nowhere", "--prompt", "x")
    assert result.exit_code == 2 and "error" in result.output


@pytest.mark.parametrize("sampling", [[], ["--temperature", 0.7, "--top-p", 0.9, "--seed", 4]])
def test_verify(sampling, tmp_path):
    common = ["--model", MODELS / "spider-cllm", "--prompt", QUESTION, "--dtype", "float32"]
    result = run("verify", *common, *sampling, "--json", tmp_path / "certificate.json")
    assert result.exit_code == 0 and "exact" in result.output, result.output
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert certificate["exact"] and certificate["lossless"] and certificate["tokens"][0] > 5


def test_verify_ids():
    common = ["--model", MODELS / "spider-cllm", "--prompt", QUESTION, "--dtype", "float32"]
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "spider-cllm")
    model = AutoModelForCausalLM.from_pretrained(MODELS / "spider-cllm", dtype="float32")
    inputs = tokenizer(common[3], return_tensors="pt", return_token_type_ids=False)
    width = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=30)[0, width:].tolist()
    result = run("verify", *common, "--ids", " ".join(map(str, ids)))
    assert result.exit_code == 0 and f"exact: {len(ids)} tokens" in result.output, result.output
    result = run("verify", *common, "--ids", ",".join(map(str, [*ids[:3], ids[3] + 1, *ids[4:]])))
    assert result.exit_code == 1 and "NOT lossless" in result.output and f"the argmax is {ids[3]}" in result.output
    for bad, message in (("", "no new tokens"), ("5 x", "token ids"), ("999999", "token 999999")):
        result = run("verify", *common, "--ids", bad)
        assert result.exit_code == 2 and message in result.output, result.output


def test_doctor_lists_every_backend(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
        monkeypatch.setenv("CLLM_BACKEND", "torch")
        backends.attention_table.cache_clear()
    result = run("doctor")
    assert result.exit_code == 0
    text = " ".join(result.output.replace("│", " ").split())
    for name, reason in backends.available().items():
        state = "available" if reason is None else f"not available: {reason.split()[0]}"
        assert f"backend {name} {state}" in text
    assert "avx2" in text
    assert "auto on cuda:0" in text and "measured sizes of attention" in text


def test_errors_keep_their_brackets(monkeypatch):
    """Brackets in a message are text, not markup of the console."""
    monkeypatch.setattr("cllm_kernels.cli.demo.run", lambda *args: (_ for _ in ()).throw(ValueError("must be [red] here")))
    result = run("demo")
    assert result.exit_code == 2 and "must be [red] here" in result.output
