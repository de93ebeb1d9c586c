"""collect, train and evaluate on a tiny task: the trained model loads, and decodes in fewer forwards."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from cllm_trainer import collect as collecting
from cllm_trainer import from_scratch, gsm8k, spider
from cllm_trainer.cli import app
from cllm_trainer.collect import collect, prompts_of
from cllm_trainer.rows import read_rows
from cllm_trainer.train import TrainConfig, train
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from typer.testing import CliRunner

from cllm_kernels import JacobiConfig, JacobiGenerator
from cllm_kernels.comparison import load_model
from cllm_kernels.spider import prompt_for, read_questions

SCHEMA = {
    "db_id": "shop",
    "table_names": ["customer", "order item"],
    "table_names_original": ["Customer", "Order_Item"],
    "column_names": [[-1, "*"], [0, "id"], [0, "full name"], [0, "age"], [1, "id"], [1, "customer id"], [1, "price"]],
    "column_names_original": [
        [-1, "*"], [0, "ID"], [0, "Full_Name"], [0, "Age"], [1, "ID"], [1, "Customer_ID"], [1, "Price"],
    ],
    "column_types": ["text", "number", "text", "number", "number", "number", "number"],
    "foreign_keys": [[5, 1]],
}  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A model of 30 thousand parameters that has learnt a little SQL."""
    questions = spider.synthesize([SCHEMA], 120)
    tokenizer = spider.tokenizer_for(questions)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "target"
    config = TrainConfig(epochs=10, batch_size=16, learning_rate=3e-3, warmup_steps=5, noisy_blocks=0)
    record = train(model, tokenizer, spider.encode(questions, tokenizer), path, config)
    return path, questions, record


def test_synthetic_questions_name_real_columns():
    questions = spider.synthesize([SCHEMA], 120, seed=1)
    assert questions == spider.synthesize([SCHEMA], 120, seed=1)
    assert len({row["question"] for row in questions}) == len(questions) == 120
    words = {"customer", "order_item", "id", "full_name", "age", "customer_id", "price"}
    for row in questions:
        assert any(word in row["query"] for word in words)
        assert row["query"] == spider.canonical_sql(row["query"])
    assert any(" join " in row["query"] for row in questions)


def test_crossed_questions_mix_two_of_one_database():
    questions = [
        {"db_id": db, "question": f"{db}a {db}b {db}c {db}d {db}e {index}"} for db in "xy" for index in range(30)
    ]
    crossed = spider.cross(questions, 80, seed=1)
    assert crossed == spider.cross(questions, 80, seed=1) and len(crossed) == 80
    asked = {row["question"] for row in questions}
    assert sum(row["question"] not in asked for row in crossed) > 40
    for row in crossed:
        words = row["question"].split()
        assert len(words) == 6
        assert all(word.isdigit() or word[0] == row["db_id"] for word in words)


def test_the_frozen_target_holds_the_model(target, tmp_path):
    """With its weight alone, a model that was pushed away comes back; the target stays as it is."""
    path, questions, _ = target
    model, tokenizer = load_model(path)
    frozen, _ = load_model(path)
    before = [p.clone() for p in frozen.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    config = TrainConfig(
        epochs=4, batch_size=16, learning_rate=2e-3, warmup_steps=5, noisy_blocks=0, ar_weight=0, target_weight=1
    )
    record = train(model, tokenizer, spider.encode(questions, tokenizer), tmp_path / "m", config, target=frozen)
    losses = [entry["target_loss"] for entry in record["history"]]
    assert losses[-1] < losses[0] / 3
    assert all(torch.equal(a, b) for a, b in zip(before, frozen.parameters(), strict=True))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_target_and_its_weight_go_together(target, tmp_path, weight):
    path, questions, _ = target
    model, tokenizer = load_model(path)
    with pytest.raises(ValueError, match=f"target_weight is {weight}"):
        train(model, tokenizer, spider.encode(questions, tokenizer), tmp_path / "m", TrainConfig(target_weight=weight),
              target=model if weight == 0 else None)  # fmt: skip
    assert not (tmp_path / "m").exists()


def test_split_is_fixed_and_disjoint():
    rows = [{"question": str(index)} for index in range(200)]
    training, held_out = spider.split(rows)
    assert len(held_out) == 10 and len(training) == 190
    assert sorted(training + held_out, key=lambda row: int(row["question"])) == rows
    assert spider.split(rows) == (training, held_out)


def test_examples_are_the_questions_most_alike():
    pool = [
        {"db_id": "a", "question": "Show the names of all singers.", "query": "SELECT name FROM singer"},
        {"db_id": "a", "question": "What are the names of all singers?", "query": "select name from singer;"},
        {"db_id": "a", "question": "How many concerts are there?", "query": "select count(*) from concert"},
        {"db_id": "a", "question": "Show the years of all concerts.", "query": "select year from concert"},
        {"db_id": "b", "question": "Show the names of all singers from France.", "query": "select name from artist"},
    ]
    own, new, unknown = spider.show_examples(
        [pool[0], {"db_id": "a", "question": "List the singers' names"}, {"db_id": "c", "question": "Singers from France"}],
        pool,
        count=2,
    )
    # not itself; the most alike last; of two with the same query the one more alike
    assert [question for question, _ in own["examples"]] == [pool[3]["question"], pool[1]["question"]]
    assert new["examples"][-1][1] in (pool[0]["query"], pool[1]["query"]) and len(new["examples"]) == 2
    assert new["examples"][0][1] not in (pool[0]["query"], pool[1]["query"])
    assert unknown["examples"][-1] == [pool[4]["question"], pool[4]["query"]]  # of all, where the database has none
    assert spider.show_examples([pool[4]], pool)[0]["examples"] == []
    assert spider.show_examples([pool[0]], pool)[0]["examples"] == own["examples"][1:]
    assert prompt_for(own) == (
        "a : Show the years of all concerts.\nselect year from concert\n"
        "What are the names of all singers?\nselect name from singer\nShow the names of all singers.\n"
    )


def test_schemas_that_are_mixed_and_invented():
    """The tables and columns that a query names stay, among others in another order."""
    other = {**SCHEMA, "db_id": "bar", "table_names_original": ["Drink", "Guest"]}
    questions = [row for row in spider.synthesize([SCHEMA], 60) if row["db_id"] == "shop"]
    mixed = spider.mix_schemas(questions, [SCHEMA, other])
    assert len(mixed) == len(questions) and mixed == spider.mix_schemas(questions, [SCHEMA, other])
    for row in mixed:
        shown = dict(part.split(" : ") for part in row["schema"].split(" | "))
        for table in {"customer", "order_item"} & set(spider.tokenize(row["query"])):
            assert set(shown[table].split(", ")) == set(spider.schema_of(SCHEMA).columns[table])
    assert len({row["schema"] for row in mixed}) > 4 and any("drink : " in row["schema"] for row in mixed)
    prompts = [prompt_for(row) for row in mixed]
    assert all(text.startswith(spider.prompt_prefix(row)) for text, row in zip(prompts, mixed, strict=True))
    invented = spider.invent_schemas([SCHEMA, other], 20)
    assert len({spider.schema_text(spider.schema_of(entry).columns) for entry in invented}) > 15
    for row in spider.show_schemas(spider.synthesize(invented, 100), invented):
        table = row["query"].split(" from ")[1].split()[0]
        assert f"{table} : " in row["schema"]


def test_schemas_whose_tables_and_columns_have_other_names():
    """A question, its query and its schema name the same, and no literal changes."""
    other = SCHEMA | {
        "db_id": "zoo",
        "table_names": ["cage", "visitors"],
        "table_names_original": ["Cage", "Visitor"],
        "column_names": [[-1, "*"], [0, "floor"], [0, "keeper"], [0, "size"], [1, "hour"], [1, "weight"], [1, "fee"]],
        "column_names_original": [
            [-1, "*"], [0, "Floor"], [0, "Keeper"], [0, "Size_m2"], [1, "Hour"], [1, "Weight"], [1, "Fee"],
        ],
    }  # fmt: skip
    words = {"cage": "cage", "visitor": "visitor", "keeper": "keeper"}
    words |= {"floor": "floor", "size_m2": "size", "hour": "hour", "weight": "weight", "fee": "fee"}
    questions = spider.synthesize([SCHEMA], 200) + [
        {"db_id": "shop", "question": "What are the full names of customers who paid the Age price?",
         "query": "SELECT Full_Name FROM Customer WHERE Price = 'Age' OR Full_Name = 'customer'"}
    ]  # fmt: skip
    renamed = spider.mix_schemas(questions, [SCHEMA, other], renamed=True)
    assert renamed == spider.mix_schemas(questions, [SCHEMA, other], renamed=True) and len(renamed) == len(questions)
    changed = 0
    for row in renamed:
        shown = set(re.split(r" \| | : |, ", row["schema"]))
        names = {name.split(".")[-1] for name in spider.tokenize(row["query"])}
        assert names & (words.keys() | {"customer", "order_item", "age", "price", "full_name", "id"}) <= shown
        changed += bool(names & words.keys())
        selected = set(re.findall(r"\w+", row["query"].split(" from ")[0]))  # keys of joins are in no question
        assert all(words[name] in row["question"] for name in selected & words.keys())
    assert changed > 150
    (literal,) = (row for row in renamed if "'Age'" in row["query"])
    assert re.search(r" from customer where \w+ = 'Age' or \w+ = 'customer'$", literal["query"])
    assert "customers who paid the Age " in literal["question"]


@pytest.fixture
def any_answer_is_taken(monkeypatch):
    """Models of a few steps end no answer."""
    read = collecting.read_rows
    monkeypatch.setattr(collecting, "read_rows", lambda path: [row | {"finished": True} for row in read(path)])
    monkeypatch.setattr(collecting, "is_degenerate", lambda *tokens, **options: False)


@pytest.mark.parametrize("schema", [False, True])
def test_one_command_makes_the_models(tmp_path, monkeypatch, any_answer_is_taken, schema):
    """Every stage on 90 questions, with a few steps each; what it writes loads, and evaluates with all baselines."""
    data, models, work = tmp_path / "data", tmp_path / "models", tmp_path / "work"
    data.mkdir()
    questions = spider.synthesize([SCHEMA], 60)
    questions += [row | {"question": f"Now tell me: {row['question']}"} for row in questions[:30]]
    monkeypatch.setattr(spider, "HELD_OUT", 0.2)  # some of either kind, with their query among the others and without
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (data / "dev.jsonl").write_text(json.dumps(questions[0]) + "\n")
    (data / "tables.json").write_text(json.dumps([SCHEMA]))
    for name in ("TARGET_CONFIG", "SCHEMA_CONFIG", "CLLM_CONFIG"):
        short = {"epochs": 0.3, "batch_size": 8, "warmup_steps": 1, "drop_degenerate": False}
        monkeypatch.setattr(spider, name, dataclasses.replace(getattr(spider, name), **short))
    for name, value in {"SYNTHETIC": 20, "INVENTED": 16, "CROSSED": 8, "DRAFT_STEPS": 2, "DRAFT_WARM_UP": 0.5,
                        "MEDUSA_STEPS": 2, "MAX_NEW_TOKENS": 12, "SAMPLE": 2}.items():  # fmt: skip
        monkeypatch.setattr(spider, name, value)
    monkeypatch.setattr(from_scratch, "COPYING_STEPS", 2)
    monkeypatch.setattr(from_scratch, "ANSWERING_STEPS", 2)
    options = ["spider", "--data", str(data), "--output", str(models), "--work", str(work), *["--schema"] * schema]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    record = json.loads((models / "spider-cllm" / "training_record.json").read_text())
    assert record["rows"] == record["answers"]["prompts"] == 72 + 8
    for name in ("target", "cllm", "draft"):
        assert (models / f"spider-{name}" / "README.md").read_text().startswith("---\nlicense")
    assert ("{schema}" in (models / "spider-cllm" / "README.md").read_text()) == schema
    for path in (models / "spider-cllm" / "held_out_sample.jsonl", work / "held_out.jsonl", work / "dev.jsonl"):
        assert all(("schema" in row) == schema != ("examples" in row) for row in read_questions(path))
    assert all((row["prefix_length"] > 0) == schema for row in read_rows(work / "answers.jsonl"))
    (models / "spider-cllm").rename(tmp_path / "spider-cllm")
    alone = CliRunner().invoke(app, [*options, "--stage", "evaluate"])
    assert alone.exit_code == 0, alone.output
    options = ["evaluate", "--target", str(models / "spider-target"), "--cllm", str(tmp_path / "spider-cllm"),
               "--draft", str(models / "spider-draft"), "--medusa", str(models / "spider-target" / "medusa.safetensors"),
               "--questions", str(work / "held_out.jsonl"), "--output", str(tmp_path / "rows.json"), "--lookup",
               "--max-new-tokens", "8", "--limit", "1"]  # fmt: skip
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert {row["method"] for row in json.loads((tmp_path / "rows.json").read_text())} == {
        "hf_ar", "jacobi_window", "jacobi_block", "prompt_lookup", "draft_model", "medusa"
    }  # fmt: skip


def test_the_first_layer_looks_at_the_token_before():
    """What make_model sets, and that the rows of the first training can be copied."""
    tokenizer = spider.tokenizer_for(spider.synthesize([SCHEMA], 20))
    model = from_scratch.make_model(tokenizer)
    model.set_attn_implementation("eager")
    tokens = torch.randint(2, len(tokenizer), (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        weights = model(tokens, output_attentions=True).attentions[0]
    before = weights.diagonal(-1, dim1=-2, dim2=-1).mean((0, 2))
    assert (before[::2] > 0.7).all() and (before[1::2] < 0.2).all()
    for row in from_scratch.copying_rows(50, len(tokenizer), 1):
        prompt, output = row["prompt_ids"], row["output_ids"]
        shown = next(count for count in range(1, 5) if prompt[-count:] + output[:-1] == prompt[:-count])
        assert 16 <= len(prompt) - shown <= 48 and output[-1] == 1
    newline = tokenizer("\n")["input_ids"][0]
    rows = from_scratch.answering_rows(80, len(tokenizer), newline, 1)
    assert rows[:20] == from_scratch.copying_rows(20, len(tokenizer), 1)
    for row in rows[20:]:
        answer = row["output_ids"][:-1]
        at = next(at for at in range(len(row["prompt_ids"])) if row["prompt_ids"][at : at + len(answer)] == answer)
        assert row["prompt_ids"][at - 1] == row["prompt_ids"][at + len(answer)] == row["prompt_ids"][-1] == newline


def test_gsm8k_by_one_command(tmp_path, monkeypatch, any_answer_is_taken):
    rows = [{"question": f"Ann has {n} pens and buys {n + 2}. How many?", "answer": f"{n}+{n + 2}=<<{n}+{n + 2}={2 * n + 2}>>{2 * n + 2}\n#### {2 * n + 2}"}
            for n in range(40)]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("TARGET_CONFIG", "CLLM_CONFIG"):
        short = {"epochs": 0.5, "batch_size": 8, "warmup_steps": 1, "drop_degenerate": False}
        monkeypatch.setattr(gsm8k, name, dataclasses.replace(getattr(gsm8k, name), **short))
    monkeypatch.setattr(gsm8k, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(from_scratch, "COPYING_STEPS", 2)
    monkeypatch.setattr(from_scratch, "ANSWERING_STEPS", 2)
    models = tmp_path / "models"
    options = ["gsm8k", "--data", str(tmp_path), "--output", str(models), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    _, tokenizer = load_model(models / "gsm8k-cllm")
    assert len(tokenizer.tokenize("1234")) == 4  # each digit alone
    record = json.loads((models / "gsm8k-cllm" / "training_record.json").read_text())
    assert record["rows"] == record["answers"]["prompts"] == 40 and record["states"] > 40
    result = CliRunner().invoke(app, [*options, "--stage", "cllms"])
    assert result.exit_code == 2 and "not one of all, target, cllm" in result.output


def test_record_and_saved_weights(target):
    path, questions, record = target
    assert json.loads((path / "training_record.json").read_text()) == record
    assert record["rows"] == 120 and record["steps"] == 80
    assert record["history"][-1]["ar_loss"] < 3
    model, tokenizer = load_model(path)
    assert model.config.dtype in (torch.float32, "float32") and model.dtype == torch.float32
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())  # stored in bf16
    assert tokenizer.padding_side == "left"


def test_collect_and_train_make_decoding_faster(target, tmp_path):
    path, questions, _ = target
    model, tokenizer = load_model(path)
    prompts = prompts_of(tokenizer, [prompt_for(row) for row in questions])
    summary = collect(
        model, tokenizer, prompts, tmp_path / "rows.jsonl", JacobiConfig(block_size=8), 32, max_new_tokens=40
    )
    rows = read_rows(tmp_path / "rows.jsonl")
    assert summary["prompts"] == len(rows) == 120
    assert sum(len(row["output_ids"]) for row in rows) == summary["tokens"]
    assert not (tmp_path / "rows.jsonl.part").exists()
    # a row holds the greedy output of its own prompt, whatever batch it was decoded in
    for row in rows[::40]:
        alone = model.generate(torch.tensor([row["prompt_ids"]]), do_sample=False, max_new_tokens=40)[0]
        assert alone[len(row["prompt_ids"]) :].tolist() == row["output_ids"]
        assert all(len(drafts) == 7 for _, drafts in row["states"])

    config = TrainConfig(epochs=12, batch_size=16, learning_rate=3e-3, warmup_steps=5, noisy_blocks=3)
    train(model, tokenizer, rows, tmp_path / "cllm", config)
    cllm, tokenizer = load_model(tmp_path / "cllm")

    def tokens_per_forward(of):
        generator = JacobiGenerator(of, JacobiConfig(block_size=8))
        inputs = tokenizer.pad({"input_ids": prompts[:32]}, padding_side="left", return_tensors="pt")
        generator.generate(**inputs, do_sample=False, max_new_tokens=40)
        return generator.statistics.tokens_per_forward

    assert tokens_per_forward(cllm) > 1.3 * tokens_per_forward(load_model(path)[0])


def test_command_line(target, tmp_path):
    path, questions, _ = target
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in questions[:6]))
    run = CliRunner().invoke
    common = ["--model", str(path)]
    result = run(app, ["collect", *common, "--prompts", str(file), "--output", str(tmp_path / "rows.jsonl"),
                       "--block-size", "4", "--max-new-tokens", "12"])  # fmt: skip
    assert result.exit_code == 0, result.output
    result = run(app, ["train", *common, "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "cllm")])
    assert result.exit_code == 0, result.output
    result = run(app, ["train", *common, "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "cllm"),
                       "--target", str(path), "--target-weight", "0.5"])  # fmt: skip
    assert result.exit_code == 0, result.output
    result = run(app, ["evaluate", "--target", str(path), "--cllm", str(tmp_path / "cllm"),
                       "--questions", str(file), "--output", str(tmp_path / "rows.json"), "--block-size", "4", "--max-new-tokens", "12"])  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["model"], row["method"]) for row in rows] == [
        (name, method) for name in ("target", "cllm") for method in ("hf_ar", "jacobi_window", "jacobi_block")
    ]
    assert all(row["equal"] == 1 and row["prompts"] == 6 for row in rows)
    result = run(app, ["evaluate", "--target", str(path), "--questions", str(file), "--limit", "1", "--plots",
                       "--output", str(tmp_path / "alone.json"), "--block-size", "4", "--max-new-tokens", "12"])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {row["model"] for row in json.loads((tmp_path / "alone.json").read_text())} == {"target"}
    assert (tmp_path / "alone_training.png").exists() and (tmp_path / "alone_trajectory.png").exists()
