"""Rows of training data: resumable collection, broken lines, other projects' formats, augmentation."""

from __future__ import annotations

import json
import random
import resource

import pytest
import torch
from cllm_trainer import collect as collecting
from cllm_trainer.collect import collect, without_degenerate
from cllm_trainer.rows import blocks_of, check_rows, correct_later, fingerprint, read_rows, to_cllm
from helpers import EOS, PAD, VOCABULARY, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cllm_kernels import JacobiConfig

CONFIG = JacobiConfig(block_size=6)


def make_tokenizer(words: int = VOCABULARY, prefix: str = "w") -> PreTrainedTokenizerFast:
    names = ["<pad>", "<eos>", *(f"{prefix}{at}" for at in range(2, words))]
    inner = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    return [[rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(3, 9))] for _ in range(11)]


def run(model, prompts, path, config=CONFIG, **options):
    return collect(model, make_tokenizer(), prompts, path, config, **{"batch_size": 4, "max_new_tokens": 20, **options})


class Stop(Exception):
    pass


@pytest.mark.parametrize("sampling", [None, {"temperature": 1.5, "top_k": 0}])
def test_an_interrupted_run_goes_on_to_the_same_file(model, prompts, tmp_path, monkeypatch, sampling):
    whole = run(model, prompts, tmp_path / "whole.jsonl", sampling=sampling)
    append, calls = collecting._append, []

    def cut(file, temporary, lines, before):
        calls.append(before)
        if len(calls) == 2:  # a machine that dies within a line
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines)[:-700])
            raise Stop
        append(file, temporary, lines, before)

    monkeypatch.setattr(collecting, "_append", cut)
    with pytest.raises(Stop):
        run(model, prompts, tmp_path / "rows.jsonl", sampling=sampling)
    assert not (tmp_path / "rows.jsonl").exists()
    monkeypatch.undo()
    # Other batches too: a row depends on its prompt alone.
    resumed = run(model, prompts, tmp_path / "rows.jsonl", sampling=sampling)
    assert (tmp_path / "rows.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "rows.jsonl.part").exists()
    assert resumed == whole


def test_what_is_there_is_not_collected_again(model, prompts, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    first = run(model, prompts, path)
    whole = path.read_bytes()
    run(model, prompts, path, max_new_tokens=10)  # another run's file gives way
    shorter = path.read_bytes()
    assert shorter != whole
    path.write_bytes(whole[:-1])  # as does one whose end is missing, or that is no such file
    assert run(model, prompts, path) == first and path.read_bytes() == whole
    path.write_bytes(b"other\n")
    run(model, prompts, path)
    assert path.read_bytes() == whole
    monkeypatch.setattr(collecting, "JacobiGenerator", None)  # nothing more can be decoded
    assert run(model, prompts, path) == first and path.read_bytes() == whole
    assert not (tmp_path / "rows.jsonl.part").exists()


def test_rows_do_not_depend_on_the_batch(model, prompts, tmp_path):
    for name, size in (("a", 3), ("b", 11)):
        run(model, prompts, tmp_path / name, batch_size=size, sampling={"temperature": 1.5, "top_k": 0})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_part_of_another_run_is_refused(model, prompts, tmp_path):
    path = tmp_path / "rows.jsonl"
    run(model, prompts, path)
    path.rename(f"{path}.part")
    with pytest.raises(ValueError, match="left by a run with another model, other prompts or settings"):
        run(model, prompts, path, max_new_tokens=21)
    with torch.no_grad():
        other = make_model(seed=1)
    with pytest.raises(ValueError, match="left by a run"):
        run(other, prompts, path)


def test_a_full_disk_loses_no_row(model, prompts, tmp_path):
    path = tmp_path / "rows.jsonl"
    run(model, prompts, tmp_path / "whole.jsonl")
    size = (tmp_path / "whole.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(OSError, match="keeps the first 4 rows"):
            run(model, prompts, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(read_rows(f"{path}.part")) == 4
    run(model, prompts, path)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_repetition_is_counted_and_kept(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "REPEATS", 2)
    summary = run(model, prompts, tmp_path / "rows.jsonl", max_new_tokens=60)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == len(prompts) == summary["prompts"]
    assert 0 < summary["degenerate"] == sum(row["degenerate"] for row in rows)
    marked = [{**row, "degenerate": index == 3} for index, row in enumerate(rows)]
    kept, left_out = without_degenerate(marked)
    assert left_out == 1 and kept == marked[:3] + marked[4:]


def test_augmentation_sets_half_of_the_later_wrong_drafts_right(model, prompts, tmp_path):
    output = list(range(10, 30))
    drafts = [10, 0, 12, 0, 0, 15, 0, 0]
    start, corrected = correct_later(0, drafts, output, 0.5, random.Random(0))
    assert start == 0 and corrected[:3] == [10, 0, 12] and corrected[5] == 15  # the first wrong one stays wrong
    assert sum(corrected[place] == output[place] for place in (3, 4, 6, 7)) == 2
    run(model, prompts, tmp_path / "a")
    run(model, prompts, tmp_path / "b", augment=True)
    for plain, more in zip(read_rows(tmp_path / "a"), read_rows(tmp_path / "b"), strict=True):
        assert more["states"][::2] == plain["states"]
        for (start, drafts), (start2, corrected) in zip(more["states"][::2], more["states"][1::2], strict=True):
            right = plain["output_ids"][start : start + len(drafts)]
            wrong = sum(a != b for a, b in zip(drafts, right, strict=False))
            left = sum(a != b for a, b in zip(corrected, right, strict=False))
            assert start2 == start and left == wrong - round(max(wrong - 1, 0) / 2)


def test_the_cllm_format_is_written_and_read(tmp_path):
    tokenizer = make_tokenizer()
    row = {
        "prompt_ids": [5, 6, 7],
        "output_ids": [10, 11, 12, 13, 14, 15, 16, EOS],
        "states": [[0, [50, 51, 52]], [2, [12, 60, 61]], [3, [70, 71, 72]], [6, [16, 80, 81]]],
        "truth_ids": [90, EOS],
    }
    assert blocks_of(row) == {0: [[50, 51, 52], [10, 11, 12]], 3: [[70, 71, 72]], 6: [[16, 80, 81]]}
    path = tmp_path / "cleaned.json"
    assert to_cllm([row], path, PAD) == 3
    entries = json.loads(path.read_text())
    assert entries[1] == {
        "data_id": "data_0", "jacobian_itr_id": "itr_1", "prompt_ids_len": [3], "prompt_ids": [[5, 6, 7, 10, 11, 12]],
        "answer_trajectory_ids": [[70, 71, 72], [13, 14, 15]], "teacher_output_ids": [[5, 6, 7, 10, 11, 12, 13, 14, 15]],
        "complete_teacher_output_ids": [5, 6, 7, *row["output_ids"]], "labels_ids": [5, 6, 7, 90, EOS],
    }  # fmt: skip
    (again,) = read_rows(path, tokenizer)
    for key in ("prompt_ids", "output_ids", "truth_ids"):
        assert again[key] == row[key]
    assert again["states"] == [(0, [50, 51, 52]), (0, [10, 11, 12]), (3, [70, 71, 72]), (6, [16, 80, 81])]
    assert again["finished"] and again["block_size"] == 4
    # nested as the collecting script nests it, garbage behind the EOS, and no complete output
    for entry in entries:
        entry["prompt_ids"] = [entry["prompt_ids"]]
        del entry["complete_teacher_output_ids"]
    entries[2]["answer_trajectory_ids"][-1][-1] = 33
    path.write_text(json.dumps(entries))
    assert read_rows(path, tokenizer)[0]["output_ids"] == row["output_ids"]
    with pytest.raises(ValueError, match="needs a tokenizer"):
        read_rows(path)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match="not a whole JSON array"):
        read_rows(path, tokenizer)


def test_the_jacobi_forcing_format_is_read(tmp_path):
    tokenizer = make_tokenizer()
    entry = {
        "prompt_ids": [[5, 6, 7]], "prompt_ids_len": 3, "traj_position_indices": [[0, 1]],
        "complete_training_sequence_ids": [5, 6, 7, 50, 51, 10, 11, 52, 53, 12, EOS],
    }  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(entry) + "\n")
    (row,) = read_rows(path, tokenizer)
    assert row["prompt_ids"] == [5, 6, 7] and row["output_ids"] == [10, 11, 12, EOS]
    assert row["states"] == [(0, [50, 51]), (2, [52, 53])]
    entry["complete_training_sequence_ids"].pop()
    path.write_text(json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match="rows.jsonl:1.*2 pairs of blocks"):
        read_rows(path, tokenizer)


def test_broken_lines_are_counted_and_left_out_only_when_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt_ids": [1], "output_ids": [2]})
    path.write_text(f"{good}\n{good[:-4]}\n{good}\n[]\n")
    with pytest.raises(ValueError, match="rows.jsonl:2.*2 of 4 rows are broken"):
        read_rows(path)
    with pytest.warns(UserWarning, match="2 broken rows left out"):
        assert len(read_rows(path, skip_broken=True)) == 2


def test_rows_are_checked_against_tokenizer_model_and_block_size(model, prompts, tmp_path):
    run(model, prompts, tmp_path / "rows.jsonl")
    rows, tokenizer = read_rows(tmp_path / "rows.jsonl"), make_tokenizer()
    check_rows(rows, tokenizer, VOCABULARY, 6)
    assert fingerprint(tokenizer) == fingerprint(make_tokenizer())
    with pytest.raises(ValueError, match="made by the tokenizer"):
        check_rows(rows, make_tokenizer(prefix="v"), VOCABULARY)
    with pytest.raises(ValueError, match="block_size 6; asked for is 8"):
        check_rows(rows, tokenizer, VOCABULARY, 8)
    with pytest.raises(ValueError, match="do not belong together"):
        check_rows(rows, tokenizer, VOCABULARY - 1)
    rows[2]["output_ids"] = [VOCABULARY]
    with pytest.raises(ValueError, match=f"row 3 holds the token {VOCABULARY}"):
        check_rows(rows, tokenizer, VOCABULARY)
    with pytest.raises(ValueError, match="do not belong together"):
        collect(model, make_tokenizer(VOCABULARY + 1), prompts, tmp_path / "x", CONFIG)
