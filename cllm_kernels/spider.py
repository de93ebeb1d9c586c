"""The text-to-SQL task of the bundled models: prompts, canonical SQL, exact match, degenerate outputs.

Questions come as JSONL rows ``{"db_id", "question", "query"}``, the format of Spider 1.0 (Yu et al. 2018,
arXiv 1809.08887), and what their prompts show besides: ``"schema"``, ``"examples"``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

# A literal, an operator or bracket, or a run of anything else up to the next of these.
_SQL_TOKEN = re.compile(r"'(?:[^']|'')*'|<=|>=|<>|!=|[=<>(),]|[^\s=<>!(),']+|.", re.DOTALL)


COLUMNS = 80  # that a prompt shows of a database


def prompt_for(row: dict) -> str:
    """The text a model of this task is prompted with: the database, its schema and examples where the row has them
    (``row["examples"]``: pairs of a question and its query), the question."""
    lines = [line for question, query in row.get("examples", ()) for line in (question, canonical_sql(query))]
    return prompt_prefix(row) + "".join(" ".join(line.split()) + "\n" for line in (*lines, row["question"]))


def prompt_prefix(row: dict) -> str:
    """What the prompts of all questions on one database begin with."""
    return f"{row['db_id']} : {row['schema']}\n" if "schema" in row else f"{row['db_id']} : "


def schema_text(tables: dict[str, list[str]]) -> str:
    """Tables and their columns in one line, in lower case: ``singer : singer_id, name | song : song_id, title``.

    Of a database with more than ``COLUMNS`` columns, tables show their first ones, all as many.
    """
    most = max(map(len, tables.values()), default=0)
    while most > 1 and sum(min(most, len(columns)) for columns in tables.values()) > COLUMNS:
        most -= 1
    parts = [f"{table} : {', '.join(columns[:most])}" for table, columns in tables.items()]
    return " ".join(" | ".join(parts).lower().split())


def canonical_sql(query: str) -> str:
    """One spelling for each query: single spaces, ``'`` quotes, no final ``;``, lower case outside literals.

    SQLite reads identifiers and keywords without regard to case, so the meaning stays the same.
    """
    text = " ".join(query.replace('"', "'").split()).rstrip("; ")
    tokens = [token if token[0] == "'" else token.lower() for token in _SQL_TOKEN.findall(text) if not token.isspace()]
    text = " ".join(tokens).replace("( ", "(").replace(" )", ")").replace(" ,", ",")
    return re.sub(r"\b(count|sum|avg|min|max) \(", r"\1(", text)


def exact_match(output: str, query: str) -> bool:
    """Whether two queries are the same text in canonical spelling (stricter than Spider's set match)."""
    return canonical_sql(output) == canonical_sql(query)


def is_degenerate(tokens: list[int], ngram: int = 4, repeats: int = 4) -> bool:
    """Whether some n-gram of at most ``ngram`` tokens stands ``repeats`` times or more in one unbroken run.

    Such outputs decode fast and mean nothing, so speed is never quoted without their share. ``tokens`` are
    one output's ids without padding.
    """
    for size in range(1, ngram + 1):
        span = size * repeats
        for start in range(len(tokens) - span + 1):
            if tokens[start : start + span] == tokens[start : start + size] * repeats:
                return True
    return False


def read_jsonl(path: str | Path, texts: tuple[str, ...] = ()) -> dict[int, dict]:
    """The rows of a JSONL file by the numbers of their lines; blank lines are left out.

    Args:
        texts: keys that every line must have a text under.

    Raises:
        OSError: the file cannot be read, such as where there is none.
        ValueError: the file is empty, or a line is not UTF-8, no JSON object or lacks a text; it is named.
    """
    rows = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
                json.dumps(row, ensure_ascii=False).encode()  # escapes may name halves of characters, which are no text
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: no JSON object, which each line must be")
            missing = [key for key in texts if not isinstance(row.get(key), str)]
            if missing:
                raise ValueError(f"{path}:{number}: no text under {', '.join(missing)}; each line needs {', '.join(texts)}")
            rows[number] = row
    if not rows:
        raise ValueError(f"{path}: no rows in this file")
    return rows


def read_questions(path: str | Path) -> list[dict]:
    """Reads a JSONL file of questions.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a JSON object with ``db_id``, ``question`` and ``query``, or its schema is no text or
            its examples are no pairs; it is named.
    """
    rows = read_jsonl(path, ("db_id", "question", "query"))
    for number, row in rows.items():
        examples = row.get("examples", [])
        pairs = isinstance(examples, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in examples)
        if not pairs or not all(isinstance(text, str) for pair in examples for text in pair):
            raise ValueError(f"{path}:{number}: examples must be a list of pairs [question, query]")
        if not isinstance(row.get("schema", ""), str):
            raise ValueError(f"{path}:{number}: the schema must be a text")
    return list(rows.values())
