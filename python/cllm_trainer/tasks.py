"""The tasks that models are evaluated on: prompts, and the quality of outputs.

A task gives prompts for the rows of its file, and :meth:`~Task.score` takes outputs to measures, each a list with one
value a row: True, False, or None where nothing can be said. Its first measure is the task's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cllm_kernels.spider import exact_match, prompt_for, read_jsonl, read_questions

from . import sandbox
from .set_match import exact_set_match, read_schemas, schema_of
from .sql import make_database, same_result

Measures = dict[str, list[bool | None]]


class Task:
    """A file of rows with texts under ``fields``; ``measure`` is what stands in the tables."""

    name: str
    measure: str
    fields: tuple[str, ...]

    def __init__(self, path: str | Path, limit: int | None = None):
        self.rows = self._read(Path(path))[:limit]

    def _read(self, path: Path) -> list[dict]:
        return list(read_jsonl(path, self.fields).values())

    def prompts(self) -> list[str]:
        raise NotImplementedError

    def score(self, outputs: list[str]) -> Measures:
        """Measures of outputs in the order of the rows."""
        return {}


class Spider(Task):
    """Text to SQL: exact set match, the whole text, and the result on generated databases (needs ``schemas``)."""

    name, measure, fields = "spider", "exact_set_match", ("db_id", "question", "query")

    def __init__(self, path: str | Path, limit: int | None = None, schemas: str | Path | None = None):
        super().__init__(path, limit)
        self.schemas = {}
        if schemas is not None:
            self.schemas = {entry["db_id"]: entry for entry in read_schemas(schemas)}
            missing = sorted({row["db_id"] for row in self.rows} - set(self.schemas))
            if missing:
                raise ValueError(f"{schemas} has no database {', '.join(missing[:5])}")

    def _read(self, path: Path) -> list[dict]:
        return read_questions(path)

    def prompts(self) -> list[str]:
        return [prompt_for(row) for row in self.rows]

    def score(self, outputs: list[str]) -> Measures:
        schemas = {name: schema_of(entry) for name, entry in self.schemas.items()}
        pairs = list(zip(outputs, self.rows, strict=True))
        measures: Measures = {
            "exact_set_match": [
                exact_set_match(output, row["query"], schemas.get(row["db_id"])) for output, row in pairs
            ],
            "exact_match": [exact_match(output, row["query"]) for output, row in pairs],
        }
        if self.schemas:
            queries: dict[str, list[str]] = {}
            for row in self.rows:
                queries.setdefault(row["db_id"], []).append(row["query"])
            databases = {
                name: [make_database(self.schemas[name], own, seed) for seed in range(3)]
                for name, own in queries.items()
            }
            measures["execution"] = [
                same_result(databases[row["db_id"]], output, row["query"]) for output, row in pairs
            ]
            for database in (one for group in databases.values() for one in group):
                database.close()
        return measures


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_answer(text: str) -> float | None:
    """The number behind ``####``, else the last one."""
    found = _NUMBER.findall(text.split("####", 1)[1]) if "####" in text else []
    if found:
        return float(found[0].replace(",", ""))
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


class GSM8K(Task):
    """Grade-school mathematics (Cobbe et al. 2021): the final answer. The prompt is that of the CLLM paper."""

    name, measure, fields = "gsm8k", "final_answer", ("question", "answer")

    def prompts(self) -> list[str]:
        return [f"Question:\n{row['question']}\nAnswer:\nLet's think step by step.\n" for row in self.rows]

    def score(self, outputs: list[str]) -> Measures:
        return {
            "final_answer": [
                final_answer(output) == final_answer(row["answer"])
                for output, row in zip(outputs, self.rows, strict=True)
            ]
        }


class HumanEval(Task):
    """Python functions (Chen et al. 2021): pass@1 of the greedy completion, cut at the next top-level statement."""

    name, measure, fields = "humaneval", "pass@1", ("prompt", "test", "entry_point")
    _STOPS = re.compile(r"\n(?=class |def |#|if |print|@|```)")

    def prompts(self) -> list[str]:
        return [row["prompt"] for row in self.rows]

    def score(self, outputs: list[str]) -> Measures:
        programs = [
            f"{row['prompt']}{self._STOPS.split(output)[0]}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"
            for output, row in zip(outputs, self.rows, strict=True)
        ]
        return {"pass@1": list(map(sandbox.passes, programs))}


class MTBench(Task):
    """The first turns of MT-bench (Zheng et al. 2023): speed, and the perplexity under the target. No judge."""

    name, measure, fields = "mt_bench", "perplexity", ()

    def _read(self, path: Path) -> list[dict]:
        rows = read_jsonl(path)
        for number, row in rows.items():
            turns = row.get("turns")
            if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
                raise ValueError(f"{path}:{number}: turns must be a list of texts")
        return list(rows.values())

    def prompts(self) -> list[str]:
        return [f"USER: {row['turns'][0]} ASSISTANT:" for row in self.rows]


TASKS: dict[str, Callable[..., Task]] = {task.name: task for task in (Spider, GSM8K, HumanEval, MTBench)}


def load_task(name: str, path: str | Path, limit: int | None = None, schemas: str | Path | None = None) -> Task:
    """A task by its name.

    Raises:
        ValueError: no such task, or its file is not what it must be.
    """
    if name not in TASKS:
        raise ValueError(f"the task is {name!r}; it must be one of {', '.join(TASKS)}")
    if schemas is not None and name != Spider.name:
        raise ValueError(f"schemas are for the task spider, not for {name}")
    return TASKS[name](path, limit, **({"schemas": schemas} if schemas is not None else {}))
