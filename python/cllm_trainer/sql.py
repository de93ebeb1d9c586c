"""Spider's other measure: execution, on databases that are made from the schemas.

It differs from the benchmark's by its databases, whose rows are generated.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator

from .set_match import NUMBER, tokenize

_STEPS = 200_000  # of SQLite's virtual machine, in thousands: about a second
ROWS = 24


def make_database(schema: dict, queries: list[str], seed: int = 0) -> sqlite3.Connection:
    """A database in memory with the tables of ``schema`` and generated rows.

    Values come from small pools, among them the literals of ``queries``, and foreign keys from the column they refer
    to, so that conditions and joins find rows.
    """
    rng = random.Random(f"{schema['db_id']} {seed}")
    literals = [token for query in queries for token in tokenize(query)]
    texts = sorted({token[1:-1].replace("''", "'") for token in literals if token[0] == "'"}) + [
        "alpha",
        "beta",
        "gamma",
    ]
    numbers = sorted({float(token) for token in literals if NUMBER.fullmatch(token)}) + [1, 2, 3, 5, 10, 50]
    numbers = [int(number) if number == int(number) else number for number in numbers]
    parents = dict(schema.get("foreign_keys", []))
    kept: dict[int, list] = {}

    def values(index: int, trail: tuple[int, ...] = ()) -> list:
        if index not in kept:
            parent = parents.get(index)
            if parent is not None and parent not in trail:
                pool = values(parent, (*trail, index))
                made = [rng.choice(pool) for _ in range(ROWS)]
            elif index in schema.get("primary_keys", []):
                made = list(range(1, ROWS + 1))
            elif schema["column_types"][index] == "number":
                made = [rng.choice(numbers) if rng.random() < 0.5 else rng.randint(0, 100) for _ in range(ROWS)]
            elif schema["column_types"][index] == "time":
                made = [
                    f"{rng.randint(1990, 2020)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}" for _ in range(ROWS)
                ]
            else:
                made = [rng.choice(texts) for _ in range(ROWS)]
            kept[index] = made
        return kept[index]

    database = sqlite3.connect(":memory:")
    for number, table in enumerate(schema["table_names_original"]):
        if table.startswith("sqlite_"):  # SQLite's own; some schemas list it
            continue
        own = [index for index, (owner, _) in enumerate(schema["column_names_original"]) if owner == number]
        names = ", ".join(f'"{schema["column_names_original"][index][1]}"' for index in own)
        database.execute(f'create table "{table}" ({names})')
        marks = ", ".join("?" * len(own))
        database.executemany(f'insert into "{table}" values ({marks})', zip(*map(values, own), strict=True))
    database.commit()
    return database


@contextlib.contextmanager
def _read_only(database: sqlite3.Connection) -> Iterator[None]:
    allowed = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
    ticks = iter(range(_STEPS // 10))
    database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY)
    database.set_progress_handler(lambda: next(ticks, None) is None, 1000)
    try:
        yield
    finally:
        database.set_authorizer(None)
        database.set_progress_handler(None, 0)


def run(database: sqlite3.Connection, query: str) -> list[tuple] | None:
    """The rows of a query, or None where it fails, writes, or takes too long."""
    try:
        with _read_only(database):
            return database.execute(query).fetchmany(10_000)
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return None


def same_result(databases: list[sqlite3.Connection], output: str, query: str) -> bool | None:
    """Whether both queries give the same rows on every database, in the same order where ``query`` orders them.

    None where ``query`` itself does not run, so that nothing can be said.
    """
    ordered = "order" in tokenize(query)
    for database in databases:
        wanted = run(database, query)
        if wanted is None:
            return None
        got = run(database, output)
        if got is None or (got != wanted if ordered else Counter(got) != Counter(wanted)):
            return False
    return True
