"""Measures of the tasks: SQL, numbers, programs."""

from __future__ import annotations

import json
import time

import pytest
from cllm_trainer import sandbox
from cllm_trainer.sql import make_database, run, same_result
from cllm_trainer.tasks import HumanEval, final_answer, load_task
from test_pipeline import SCHEMA


def test_results_on_generated_databases():
    queries = ["select full_name from Customer where age > 30", "select avg(price) from Order_Item"]
    databases = [make_database(SCHEMA, queries, seed) for seed in range(3)]
    assert all(len(run(database, "select * from Customer")) > 0 for database in databases)
    joined = "select count(*) from customer join order_item on customer.id = order_item.customer_id"
    assert all(run(database, joined)[0][0] > 0 for database in databases)
    assert same_result(databases, "select full_name from Customer where not age <= 30", queries[0]) is True
    assert same_result(databases, "select full_name from Customer where age > 31", queries[0]) is not None
    assert same_result(databases, "select full_name from Customer", queries[0]) is False
    assert same_result(databases, "select nonsense", queries[0]) is False
    assert same_result(databases, queries[0], "select nonsense") is None
    ordered = "select full_name from Customer order by id"
    assert same_result(databases, ordered + " desc", ordered) is False
    assert same_result(databases, ordered + " desc", "select full_name from Customer") is True


def test_queries_cannot_write_and_cannot_hang():
    database = make_database(SCHEMA, [])
    assert run(database, "drop table Customer") is None
    assert run(database, "attach database '/tmp/x' as x") is None
    assert len(run(database, "select * from Customer")) > 0
    begin = time.perf_counter()
    assert run(database, "select count(*) from " + ", ".join(f"Customer as t{i}" for i in range(8))) is None
    assert time.perf_counter() - begin < 20


def test_spider_scores_with_and_without_schemas(tmp_path):
    query = "select t1.id, t2.price from customer as t1 join order_item as t2 on t1.id = t2.customer_id"
    questions, schemas = tmp_path / "questions.jsonl", tmp_path / "tables.json"
    queries = (query, query, "select nonsense from customer")
    rows = [{"db_id": "shop", "question": "?", "query": text} for text in queries]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    schemas.write_text(json.dumps([SCHEMA]))
    outputs = [query, query.replace("t1.id,", "t2.customer_id,"), query]
    assert load_task("spider", questions, schemas=schemas).score(outputs) == {
        "exact_set_match": [True, True, None], "exact_match": [True, False, False], "execution": [True, True, None],
    }  # fmt: skip
    assert load_task("spider", questions).score(outputs) == {
        "exact_set_match": [True, False, False], "exact_match": [True, False, False],
    }  # fmt: skip


def test_final_answers():
    assert final_answer("so 3 and\n#### 1,234") == 1234
    assert final_answer("It is -3.5 dollars, 7 left.") == 7
    assert final_answer("none") is None


@pytest.mark.parametrize(
    ("program", "good"),
    [("assert 1 + 1 == 2", True), ("assert False", False), ("raise SystemExit(0)", False), ("while True: pass", False),
     ("x = bytearray(4 << 30)", False), ("import time; time.sleep(60)", False), ("open('f', 'w').write('x' * (2 << 20))", False),
     ("import os\nassert 'PATH' not in os.environ or os.environ.get('HOME') is None", True)],
)  # fmt: skip
def test_programs_run_within_limits(program, good):
    begin = time.perf_counter()
    assert sandbox.passes(program, seconds=1.5) is good
    assert time.perf_counter() - begin < 5


def test_human_eval_takes_the_function_alone(tmp_path):
    row = {
        "task_id": "x",
        "prompt": "def add(a, b):\n",
        "test": "def check(f):\n    assert f(1, 2) == 3\n",
        "entry_point": "add",
    }
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps(row) + "\n")
    task = HumanEval(path)
    assert task.score(["    return a + b\n\nprint(undefined)"]) == {"pass@1": [True]}
    assert task.score(["    return a - b\n"]) == {"pass@1": [False]}


def test_bad_tasks_are_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match="'gsm9k'; it must be one of spider, gsm8k, humaneval, mt_bench"):
        load_task("gsm9k", path)
    with pytest.raises(ValueError, match="x.jsonl:1: no text under answer; each line needs question, answer"):
        load_task("gsm8k", path)
    with pytest.raises(ValueError, match="schemas are for the task spider"):
        load_task("gsm8k", path, schemas=path)
