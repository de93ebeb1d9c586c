"""The bundled models: what their cards claim, and Jacobi decoding on real questions with long accepted runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cllm_kernels import JacobiConfig, JacobiGenerator
from cllm_kernels.spider import exact_match, prompt_for, read_questions

MODELS = Path(__file__).parents[2] / "models"
NAMES = ("target", "cllm")
QUESTIONS = read_questions(MODELS / "spider-cllm" / "held_out_sample.jsonl")
LIMIT = 200


@pytest.fixture(scope="module", params=NAMES)
def bundled(request):
    path = MODELS / f"spider-{request.param}"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return request.param, model, AutoTokenizer.from_pretrained(path)


def encode(tokenizer, questions):
    texts = [prompt_for(row) for row in questions]
    return tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)


def evaluation(name, method="jacobi_window"):
    rows = json.loads((MODELS / f"spider-{name}" / "evaluation.json").read_text())
    return next(row for row in rows if row["method"] == method)


def test_models_are_small_and_have_their_records():
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) < 20_000_000
    for name in NAMES:
        record = json.loads((MODELS / f"spider-{name}" / "training_record.json").read_text())
        assert {"config", "rows", "steps", "seconds", "history", "versions"} <= set(record)
        assert (MODELS / f"spider-{name}" / "README.md").read_text().startswith("---\nlicense: apache-2.0")


@pytest.mark.parametrize("mode", ["window", "block"])
def test_outputs_equal_generate_and_speed_is_as_claimed(bundled, mode):
    name, model, tokenizer = bundled
    inputs = encode(tokenizer, QUESTIONS)
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=LIMIT)
    generator = JacobiGenerator(model, JacobiConfig(block_size=16, mode=mode))
    got = generator.generate(**inputs, do_sample=False, max_new_tokens=LIMIT)
    assert torch.equal(got, expected)
    claim = evaluation(name, f"jacobi_{mode}")
    # the sample is one seventh of the questions of the claim
    assert generator.statistics.tokens_per_forward == pytest.approx(claim["tokens_per_forward"], rel=0.2)
    texts = tokenizer.batch_decode(got[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    correct = sum(exact_match(text, row["query"]) for text, row in zip(texts, QUESTIONS, strict=True))
    assert correct / len(QUESTIONS) == pytest.approx(claim["exact_match"], abs=0.15)
    assert claim["equal"] == 1.0


def test_the_cllm_needs_fewer_forwards_than_its_target():
    assert evaluation("cllm")["tokens_per_forward"] > 1.25 * evaluation("target")["tokens_per_forward"]


def test_counts_by_their_definitions(bundled):
    """Counts fast-forwarded and stationary tokens again from the windows, with the outcome known."""
    _, model, tokenizer = bundled
    generator = JacobiGenerator(model, JacobiConfig(block_size=16, record_trajectory=True))
    inputs = encode(tokenizer, QUESTIONS[:16])
    sequences = generator.generate(**inputs, do_sample=False, max_new_tokens=LIMIT)[:, inputs["input_ids"].shape[1] :]
    total = 0
    for row, windows, output in zip(
        generator.statistics.rows, generator.trajectory, sequences.tolist(), strict=True
    ):
        tokens = output[: row.tokens]
        starts = [start for start, _ in windows] + [row.tokens]
        drafts = [dict(enumerate(draft, start)) for start, draft in windows]
        predictions = []
        for k, (start, _) in enumerate(windows):
            seen = dict(enumerate(tokens[start : starts[k + 1]], start))
            if k + 1 < len(windows):  # wrong predictions are the next window's first drafts
                following = windows[k + 1]
                kept = 16 - (starts[k + 1] - start)
                seen |= dict(enumerate(following[1][:kept], following[0]))
            predictions.append(seen)
        stationary = paper_stationary = 0
        fronts, front = set(), 0
        for position, token in enumerate(tokens):
            commit = next(k for k in range(len(windows)) if starts[k] <= position < starts[k + 1])
            first = commit
            while first and predictions[first - 1].get(position) == token:
                first -= 1
            paper_stationary += first + 1 < front
            front = max(front, first + 1)
            fronts.add(front)
            accepted = drafts[commit].get(position) == token and position < starts[commit + 1] - 1
            stationary += bool(accepted and commit and drafts[commit - 1].get(position) == token)
        assert row.fast_forwarded == len(tokens) - len(windows)
        assert row.stationary == stationary
        assert row.paper_stationary == paper_stationary
        assert row.paper_fast_forwarded == len(tokens) - len(fronts)
        total += stationary
    assert total > 0
