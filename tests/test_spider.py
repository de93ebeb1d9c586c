"""Canonical SQL, exact match, degenerate outputs."""

from __future__ import annotations

import pytest

from cllm_kernels.spider import canonical_sql, exact_match, is_degenerate, prompt_for, schema_text


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT  count(*) FROM head WHERE age  >  56", "select count(*) from head where age > 56"),
        ("SELECT name ,  born_state FROM head ;", "select name, born_state from head"),
        ('SELECT a FROM t WHERE b >= 5 AND c = "It (X), Y"', "select a from t where b >= 5 and c = 'It (X), Y'"),
        ("SELECT MAX ( price ) FROM wine WHERE p<>3", "select max(price) from wine where p <> 3"),
        ("select a from t where b in (SELECT c FROM d)", "select a from t where b in (select c from d)"),
        ("select a from t where b = 'x''y' and c!=1", "select a from t where b = 'x''y' and c != 1"),
    ],
)
def test_canonical_sql(query, expected):
    assert canonical_sql(query) == expected
    assert canonical_sql(expected) == expected
    assert exact_match(query, expected)


def test_literals_keep_their_case():
    assert not exact_match("select a from t where b = 'X'", "select a from t where b = 'x'")


def test_prompt():
    assert prompt_for({"db_id": "db", "question": "How \n many ?"}) == "db : How many ?\n"


def test_prompt_with_a_schema():
    schema = schema_text({"Singer": ["ID", "Name"], "song": ["Title"]})
    assert schema == "singer : id, name | song : title"
    row = {"db_id": "db", "question": "How many ?", "schema": schema}
    assert prompt_for(row) == "db : singer : id, name | song : title\nHow many ?\n"
    wide = schema_text({f"t{table}": [f"c{column}" for column in range(table)] for table in range(1, 40)})
    shown = [part.split(" : ")[1].split(", ") for part in wide.split(" | ")]
    assert [len(columns) for columns in shown] == [1] + 38 * [2]  # all as many, and at most 80


@pytest.mark.parametrize(
    ("tokens", "degenerate"),
    [
        ([1, 2, 3, 4, 5], False),
        ([7, 7, 7], False),
        ([1, 7, 7, 7, 7, 2], True),
        ([9, 1, 2, 1, 2, 1, 2, 1, 2], True),
        ([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], False),
        ([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], True),
        ([1, 2, 3, 4, 5] * 4, False),  # five tokens long
        ([], False),
    ],
)
def test_degenerate(tokens, degenerate):
    assert is_degenerate(tokens) is degenerate
