"""Spider's two measures: exact set match, and execution on databases that are made from the schemas.

Own code after Yu et al. 2018 (arXiv 1809.08887) and the description of its evaluation; counts can differ from those
of the official script, and execution differs by its databases, whose rows are generated.
"""

from __future__ import annotations

import contextlib
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator

from cllm_kernels.spider import canonical_sql

_CLAUSES = ("select", "from", "where", "group by", "having", "order by", "limit")
_SET_OPERATORS = ("union", "intersect", "except")
_TOKEN = re.compile(r"'(?:[^']|'')*'|<=|>=|<>|!=|[=<>(),+\-/*]|[^\s=<>!(),'+\-/*]+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_STEPS = 200_000  # of SQLite's virtual machine, in thousands: about a second
ROWS = 24


def tokenize(query: str) -> list[str]:
    """Tokens of a canonical query; ``group by`` and ``order by`` are one."""
    tokens: list[str] = []
    for token in _TOKEN.findall(canonical_sql(query)):
        if token == "by" and tokens and tokens[-1] in ("group", "order"):
            tokens[-1] += " by"
        else:
            tokens.append("!=" if token == "<>" else token)
    return tokens


def _split(tokens: list[str], separators: tuple[str, ...]) -> list[tuple[str, list[str]]]:
    """``(separator before it, tokens)`` of each part outside brackets."""
    parts, depth, current, name = [], 0, [], ""
    for token in tokens:
        depth += (token == "(") - (token == ")")
        if depth == 0 and token in separators:
            parts.append((name, current))
            name, current = token, []
        else:
            current.append(token)
    return [*parts, (name, current)]


def components(query: str, columns: dict[str, list[str]] | None = None) -> tuple:
    """What exact set match compares: each clause as a set, literals as one value, aliases resolved.

    Args:
        columns: of each table, in lower case; with it, a bare column name gets the one table of FROM that has it.
    """
    return _components(tokenize(query), columns or {})


def _components(tokens: list[str], columns: dict[str, list[str]]) -> tuple:
    parts = _split(tokens, _SET_OPERATORS)
    if len(parts) > 1:
        return tuple((operator, _components(part, columns)) for operator, part in parts)
    clauses = {name: part for name, part in _split(tokens, _CLAUSES) if name}
    tables, aliases = [], {}
    for _, part in _split(clauses.get("from", []), ("join", ",")):
        name = part[:1]
        if name and name[0] != "(":
            tables.append(name[0])
            if "as" in part:
                aliases[part[part.index("as") + 1]] = name[0]

    def resolve(token: str) -> str:
        if token[0] == "'" or _NUMBER.fullmatch(token):
            return "value"
        if "." in token:
            table, column = token.split(".", 1)
            return f"{aliases.get(table, table)}.{column}"
        owners = [table for table in tables if token in columns.get(table, ())]
        return f"{owners[0]}.{token}" if len(owners) == 1 else token

    def items(part: list[str], *separators: str) -> frozenset:
        return frozenset(Counter(item(tokens) for _, tokens in _split(part, separators)).items())

    def item(part: list[str]) -> tuple:
        if "(" in part:
            at = part.index("(")
            if part[at + 1 : at + 2] == ["select"]:
                end = len(part) - 1 - part[::-1].index(")")
                return (*item(part[:at]), _components(part[at + 1 : end], columns), *item(part[end + 1 :]))
        return tuple(resolve(token) for token in part)

    found: dict[str, object] = {}
    for name, part in clauses.items():
        if name == "select":
            found[name] = (part[:1] == ["distinct"], items(part[part[:1] == ["distinct"] :], ","))
        elif name == "from":
            inner = [item(source) for _, source in _split(part, ("join",)) if source[:1] == ["("]]
            found[name] = (frozenset(Counter(tables).items()), frozenset(inner))
        elif name in ("where", "having"):
            joined = _between(part)
            found[name] = (items(joined, "and", "or"), "or" in joined)
        elif name == "group by":
            found[name] = items(part, ",")
        elif name == "order by":
            keys = [tokens for _, tokens in _split(part, (",",))]
            found[name] = tuple((item([t for t in key if t not in ("asc", "desc")]), "desc" in key) for key in keys)
        else:
            found[name] = True  # that there is a limit; its number is a literal
    return tuple(sorted(found.items()))


def _between(tokens: list[str]) -> list[str]:
    """The ``and`` of ``between a and b`` becomes part of the condition."""
    result, waiting = [], False
    for token in tokens:
        if token == "and" and waiting:
            token, waiting = "..", False
        waiting = waiting or token == "between"
        result.append(token)
    return result


def exact_set_match(output: str, query: str, columns: dict[str, list[str]] | None = None) -> bool:
    """Whether both queries have the same components. What cannot be taken apart matches nothing."""
    try:
        return components(output, columns) == components(query, columns)
    except (IndexError, ValueError):
        return False


def columns_of(schema: dict) -> dict[str, list[str]]:
    """The columns of each table of an entry of Spider's ``tables.json``, in lower case."""
    tables = [name.lower() for name in schema["table_names_original"]]
    found: dict[str, list[str]] = {table: [] for table in tables}
    for table, name in schema["column_names_original"]:
        if table >= 0:
            found[tables[table]].append(name.lower())
    return found


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
    numbers = sorted({float(token) for token in literals if _NUMBER.fullmatch(token)}) + [1, 2, 3, 5, 10, 50]
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
    ordered = "order by" in tokenize(query)
    for database in databases:
        wanted = run(database, query)
        if wanted is None:
            return None
        got = run(database, output)
        if got is None or (got != wanted if ordered else Counter(got) != Counter(wanted)):
            return False
    return True
