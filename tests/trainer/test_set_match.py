"""Exact set match. The verdicts of ``PAIRS`` are those that Spider's script gave on the same pairs and schema."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from cllm_trainer.set_match import exact_set_match, schema_of, tokenize

SCHEMA = {
    "db_id": "library",
    "table_names_original": ["Author", "Book", "Loan"],
    "column_names_original": [
        [-1, "*"], [0, "ID"], [0, "Name"], [0, "Born"], [1, "ID"], [1, "Title"], [1, "Author_ID"], [1, "Price"],
        [1, "Pages"], [2, "Book_ID"], [2, "Reader"], [2, "Days"],
    ],
    "foreign_keys": [[6, 1], [9, 4]],
}  # fmt: skip

ONE = "SELECT Title, Price FROM Book WHERE Price > 5 AND Pages < 300 ORDER BY Price DESC LIMIT 3"
JOINED = (
    "SELECT T1.Name, count(*) FROM Author AS T1 JOIN Book AS T2 ON T1.ID = T2.Author_ID WHERE T2.Price > 5 "
    "GROUP BY T1.ID HAVING count(*) >= 2"
)
THREE = (
    "SELECT T3.Reader FROM Author AS T1 JOIN Book AS T2 ON T1.ID = T2.Author_ID JOIN Loan AS T3 ON "
    "T2.ID = T3.Book_ID WHERE T1.Name = 'Ada'"
)
NESTED = "SELECT Name FROM Author WHERE ID NOT IN (SELECT Author_ID FROM Book WHERE Price > 5 AND Pages < 300)"
INNER = "SELECT count(*) FROM (SELECT DISTINCT Title FROM Book WHERE Price > 5)"
COUNTED = JOINED.replace(">= 2", "> (SELECT count(DISTINCT T1.ID) FROM Author AS T1 JOIN Book AS T2 WHERE Pages = 9)")
EITHER = (
    "SELECT T1.Name FROM Author AS T1 JOIN Book AS T2 ON T1.ID = T2.Author_ID WHERE T2.Price > 5 "
    "UNION SELECT Name FROM Author WHERE Born > 1900"
)
BETWEEN = "SELECT Title FROM Book WHERE Price BETWEEN 5 AND 9 AND Title LIKE '%a%'"
KEYS = "SELECT Pages, Price, count(*) FROM Book GROUP BY Pages, Price ORDER BY Pages, Price ASC"

# Of a query, a change in it (old, new) and what the script says of the changed query.
PAIRS = {
    "values": [
        (ONE, ("> 5", "> 77"), True), (ONE, ("> 5", "> -0.5"), True), (ONE, ("> 5", "> 'x y'"), True),
        (ONE, ("> 5", "> Pages"), True), (ONE, ("> 5", "> (5)"), True), (ONE, ("> 5", "> nothing"), False),
        (ONE, ("LIMIT 3", "LIMIT 9"), True), (ONE, (" LIMIT 3", ""), False), (THREE, ("'Ada'", '"Bob"'), True),
        (THREE, ("'Ada'", "'O''Hara'"), False), (THREE, ("'Ada'", "'O'Hara'"), False),
        (NESTED, ("> 5", "> 77"), True), (INNER, ("> 5", "> 77"), False), (BETWEEN, ("5 AND 9", "1 AND 2"), True),
        ("SELECT count(*) FROM (SELECT ID FROM Book WHERE Price BETWEEN 5 AND 9)", ("5 AND 9", "5 AND 10"), False),
    ],
    "order of parts": [
        (ONE, ("Title, Price", "Price, Title"), True),
        (ONE, ("Price > 5 AND Pages < 300", "Pages < 300 AND Price > 5"), True),
        (NESTED, ("Price > 5 AND Pages < 300", "Pages < 300 AND Price > 5"), False),
        (KEYS, ("GROUP BY Pages, Price", "GROUP BY Price, Pages"), False),
        (KEYS, ("ORDER BY Pages, Price", "ORDER BY Price, Pages"), False),
        (JOINED, (">= 2", ">= 2 AND avg(T2.Price) > 1"), False),
        (EITHER, ("UNION SELECT Name FROM Author WHERE Born > 1900",
                  "UNION SELECT T1.Name FROM Author AS T1 JOIN Book AS T2 WHERE T2.Price > 5"), False),
    ],
    "clauses": [
        (ONE, ("DESC", "ASC"), False), (ONE, ("DESC ", ""), False), (KEYS, (" ASC", ""), True),
        (KEYS, ("BY Pages, Price ASC", "BY Pages DESC, Price ASC"), True),
        (KEYS, ("BY Pages, Price ASC", "BY Pages, Price DESC"), False),
        (ONE, ("AND", "OR"), False), (ONE, (" AND Pages < 300", ""), False), (ONE, (">", ">="), False),
        (ONE, ("Title, Price", "Title"), False), (ONE, ("Title, Price", "Title, Price, Price"), False),
        (JOINED, (" GROUP BY T1.ID", ""), False), (JOINED, (" HAVING count(*) >= 2", ""), False),
        (JOINED, ("HAVING count(*)", "HAVING count(T1.ID)"), False), (JOINED, ("SELECT T1.Name,", "SELECT"), False),
        (BETWEEN, ("LIKE", "NOT LIKE"), False), (BETWEEN, ("LIKE", "="), False),
        (BETWEEN, ("BETWEEN 5 AND 9", ">= 5 AND Price <= 9"), False), (NESTED, ("NOT IN", "IN"), False),
        (ONE, ("SELECT Title, Price", "SELECT Title, max(Price)"), False), (ONE, ("LIMIT 3", "LIMIT"), False),
        ("SELECT ID FROM Book WHERE Pages > 1 OR Price > 1 AND Title = 'a'", ("AND", "OR"), False),
    ],
    "distinct": [
        (ONE, ("SELECT", "SELECT DISTINCT"), True), (JOINED, ("count(*) FROM", "count(DISTINCT *) FROM"), True),
        (EITHER, ("UNION SELECT", "UNION SELECT DISTINCT"), True),
        (NESTED, ("(SELECT", "(SELECT DISTINCT"), False), (INNER, ("DISTINCT ", ""), False),
        (COUNTED, ("DISTINCT ", ""), False),
    ],
    "names": [
        (JOINED, ("T1", "writer"), True), (JOINED, ("T1.Name", "Name"), True), (JOINED, ("T1.Name", "T2.Name"), False),
        (ONE, ("Price >", "Book.Price >"), True), (ONE, ("Price >", "Loan.Days >"), False),
        (JOINED, ("T1", "Loan"), False), (JOINED, (" AS T1", " T1"), False),
        (ONE, ("Title,", "Title AS t,"), False), (ONE, ("Title,", "Nothing,"), False), (ONE, ("Book", "Shelf"), False),
        (EITHER, ("UNION SELECT Name FROM Author WHERE",
                  "UNION SELECT T1.Name FROM Author AS T1 WHERE"), True),
        (EITHER, ("UNION SELECT Name FROM Author WHERE Born",
                  "UNION SELECT T2.Name FROM Author AS T2 WHERE T2.Born"), False),
        ("SELECT T1.ID FROM Author AS T1 EXCEPT SELECT T1.ID FROM Book AS T1",
         ("T1.ID FROM Book AS T1", "T2.ID FROM Book AS T2"), False),
        ("SELECT T1.ID FROM Author AS T1 EXCEPT SELECT T1.ID FROM Book AS T1",
         ("T1.ID FROM Book", "Book.ID FROM Book"), True),
    ],
    "foreign keys": [
        (JOINED, ("GROUP BY T1.ID", "GROUP BY T2.Author_ID"), True),
        (JOINED, ("GROUP BY T1.ID", "GROUP BY T2.ID"), False),
        (THREE, ("T3.Reader", "T3.Book_ID"), False), (NESTED, ("(SELECT Author_ID", "(SELECT ID"), False),
        (COUNTED, ("DISTINCT T1.ID", "DISTINCT T2.Author_ID"), False),
        ("SELECT Author_ID FROM Book", ("Author_ID FROM Book", "ID FROM Author"), False),
        # Of the tables in the first FROM alone.
        ("SELECT Name FROM Author UNION SELECT T1.ID FROM Book AS T1 JOIN Loan AS T2", ("T1.ID", "T2.Book_ID"), False),
        ("SELECT Title FROM Book AS T1 JOIN Loan AS T2 UNION SELECT T1.ID FROM Book AS T1 JOIN Loan AS T2",
         ("T1.ID", "T2.Book_ID"), True),
    ],
    "joins": [
        (JOINED, ("Author AS T1 JOIN Book AS T2", "Book AS T2 JOIN Author AS T1"), True),
        (JOINED, ("T1.ID = T2.Author_ID", "T2.Author_ID = T1.ID"), True),
        (JOINED, ("T1.ID = T2.Author_ID", "T1.Born = T2.Pages"), True),
        (JOINED, (" ON T1.ID = T2.Author_ID", ""), True),
        (JOINED, ("T1.ID = T2.Author_ID", "T1.ID = T2.Author_ID OR T1.Born = 1"), True),
        (JOINED, ("T1.ID = T2.Author_ID", "T1.Born = 1 OR T1.ID = T2.Author_ID"), False),
        (JOINED, ("JOIN", "INNER JOIN"), False), (JOINED, ("JOIN", "LEFT JOIN"), False),
        (THREE, ("JOIN Loan", "INNER JOIN Loan"), True),
        (JOINED, ("T1 JOIN Book AS T2 ON T1.ID = T2.Author_ID", "T1, Book AS T2"), False),
        (JOINED, ("T1 JOIN", "T1 JOIN Loan JOIN"), False), (JOINED, ("Book AS", "Loan AS"), False),
    ],
    "set operators": [
        (EITHER, ("UNION", "EXCEPT"), False), (EITHER, ("UNION", "UNION ALL"), False),
        (EITHER, ("Born > 1900", "Born > 1"), True), (EITHER, ("Born >", "Born <"), False),
        (EITHER, ("UNION SELECT Name FROM Author WHERE Born > 1900",
                  "UNION (SELECT Name FROM Author WHERE Born > 1900)"), True),
        (EITHER, (" UNION SELECT Name FROM Author WHERE Born > 1900", ""), False),
    ],
    "what the script cannot read": [
        (ONE, (ONE, ""), False), (ONE, (ONE, "no query"), False),
        (ONE, ("Price > 5 AND Pages < 300", "(Price > 5)"), False),
        (ONE, ("Price > 5", "(Price > 5)"), False), (ONE, ("> 5", "IS NULL"), False),
        (ONE, ("> 5", "IN (5, 6)"), False),
        (ONE, ("Price > 5", "NOT Price > 5"), False), (ONE, ("300", "300 301"), False),
        (JOINED, ("count(*) FROM", "count(1) FROM"), False),
        (JOINED, ("count(*) FROM", "count(T1.*) FROM"), False),
        ("SELECT Title FROM Book WHERE Price != 5", ("!=", "<>"), False),
    ],
    "what the script reads": [
        (ONE, (ONE, ONE.upper() + " ;"), True), (ONE, (ONE, f"({ONE})"), True),
        (ONE, ("Title, Price", "(Title), Price"), True),
        (ONE, ("Title, Price", "Title Price"), True), (ONE, ("LIMIT 3", "LIMIT 3 OFFSET 2"), True),
        ("SELECT Title FROM Book AS T1 JOIN Loan AS T2", ("T2", "T2 ON"), True),
        (KEYS, ("Price ASC", "Price ASC and so on"), True), (BETWEEN, ("'%a%'", "'%a%' and so on"), False),
        (BETWEEN, ("'%a%'", "'%a%' 301"), False),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("query", "change", "same"), [pair for pairs in PAIRS.values() for pair in pairs],
    ids=[f"{kind} {index}" for kind, pairs in PAIRS.items() for index in range(len(pairs))],
)  # fmt: skip
def test_the_script_says_the_same(query, change, same):
    output = query.replace(*change)
    assert output != query
    assert exact_set_match(output, query, schema_of(SCHEMA)) is same


@pytest.mark.parametrize("query", [ONE, JOINED, THREE, NESTED, INNER, COUNTED, EITHER, BETWEEN, KEYS])
def test_a_query_matches_itself(query):
    assert exact_set_match(query, query, schema_of(SCHEMA)) is True
    assert exact_set_match(query, query) is True


def test_brackets_and_spaces_that_change_nothing():
    """The script takes offence at these; see the module."""
    schema = schema_of(SCHEMA)
    assert exact_set_match(JOINED.replace("count(*) FROM", "(count(*)) FROM"), JOINED, schema)
    assert exact_set_match(JOINED.replace(" = ", "=").replace(" > ", ">").replace(" >= ", ">="), JOINED, schema)


def test_foreign_keys_make_columns_equal():
    schema = schema_of(SCHEMA)
    assert schema.equal == {
        "author.id": "author.id", "book.author_id": "author.id", "book.id": "book.id", "loan.book_id": "book.id",
    }  # fmt: skip
    assert schema.columns["loan"] == ["book_id", "reader", "days"]
    assert schema_of(SCHEMA | {"foreign_keys": [[6, 1], [9, 6]]}).equal["loan.book_id"] == "author.id"


def test_without_a_schema():
    assert exact_set_match(ONE.replace("Price >", "Book.Price >"), ONE) is True
    assert exact_set_match(JOINED.replace("T1", "a"), JOINED) is True
    assert exact_set_match(JOINED.replace("T1.Name", "T2.Name"), JOINED) is False
    assert exact_set_match(JOINED.replace("T1.Name", "Name"), JOINED) is False  # whose it is cannot be known
    assert exact_set_match(JOINED.replace("GROUP BY T1.ID", "GROUP BY T2.Author_ID"), JOINED) is False
    for output in ("select from where", "select , from book", "select a from 'book'", "select a from book where = 5"):
        assert exact_set_match(output, ONE) is False


def test_nothing_is_said_of_a_query_that_cannot_be_read():
    assert exact_set_match("SELECT a FROM b", "SELECT a FROM b", schema_of(SCHEMA)) is None
    assert exact_set_match(ONE, "SELECT Title FROM Book WHERE Price IS NULL", schema_of(SCHEMA)) is None


def test_each_query_of_the_sample_matches_itself_alone():
    rows = Path(__file__).parents[2] / "models" / "spider-cllm" / "held_out_sample.jsonl"
    queries = [json.loads(line)["query"] for line in rows.read_text().splitlines()]
    assert all(exact_set_match(query, query) for query in queries)
    pairs = sum(exact_set_match(a, b) for a in queries for b in queries)
    assert pairs < len(queries) + 12  # some differ in values alone


def test_any_text_gets_a_verdict_soon():
    """Outputs of a model that repeats itself, breaks off, or writes anything."""
    rng = random.Random(0)
    words = sorted({token for query in (ONE, JOINED, NESTED, INNER, EITHER, KEYS) for token in tokenize(query)})
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(500)]
    texts += [JOINED[:size] for size in range(len(JOINED))]
    texts += ["select title from (" * 3000, "select " + "(" * 5000, "select title from book where " * 2000, "as"]
    begin = time.perf_counter()
    for text in texts:
        assert exact_set_match(text, JOINED, schema_of(SCHEMA)) is False
        assert exact_set_match(text, JOINED) is False
    assert time.perf_counter() - begin < 20
