"""The recipe of the bundled text-to-SQL models: tokenizer, target from scratch, its answers, CLLM.

Data: Spider's training questions with 5 % held out, and questions that templates make from the schemas of the
same databases. A prompt names the database and shows the training question that is most like the one asked, with its
query (a retrieved example, as in DAIL-SQL, Gao et al. 2023, arXiv 2308.15363). With ``schema=True`` a target gets the
schema in its prompt instead, and questions on schemas that are mixed and invented, so that databases it has not seen are
possible.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import random
import re
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cllm_kernels.comparison import compare_models, load_model
from cllm_kernels.spider import canonical_sql, prompt_for, prompt_prefix, read_questions, schema_text

from . import from_scratch
from .baselines import distil_draft, train_medusa
from .collect import collect_answers, tqdm_of, with_first_states
from .from_scratch import learn_to_copy, make_model, make_tokenizer
from .settings import TrainConfig
from .set_match import read_schemas, schema_of, tokenize
from .train import train

_WORD = re.compile(r"[a-z]+|\d+")
_IDENTIFIER = re.compile(r"'(?:[^']|'')*'|\w+")  # a literal, lest a word inside one be taken for a name, or a name
_PIECES = 3, 4  # characters of the pieces of words that likeness counts, as in singer, singers and singing
HELD_OUT = 0.05
EXAMPLES = 1
VOCABULARY = 1024
SYNTHETIC = 3000
INVENTED = 4000  # questions on schemas that there are not, for targets with the schema in the prompt
RENAMED = 4  # times that each question comes on mixed schemas with other names, for these targets too
TOGETHER = 8  # questions of one database that a batch takes together
MAX_NEW_TOKENS = 256
BLOCK_SIZE = 16
BARE = 0.05  # share of the prompts that show no examples, since a user may have none
CROSSED = 4000
SAMPLE = 48  # held-out questions that travel with the CLLM, for the demo
PASSES = 8  # over the real and the synthetic questions
CIPHERS = 12  # of each question that shows its own query, beside these
COMMON = 0.05  # share of the queries that have a token which a cipher keeps
TARGET_CONFIG = TrainConfig(
    epochs=1, batch_size=32, learning_rate=1e-3, weight_decay=0.1, warmup_steps=200, noisy_blocks=0, bf16=True
)
SCHEMA_CONFIG = dataclasses.replace(TARGET_CONFIG, epochs=4, prefix_rows=TOGETHER)
CLLM_CONFIG = TrainConfig(
    epochs=2.5, batch_size=8, learning_rate=1e-3, weight_decay=0.1, warmup_steps=100, noisy_blocks=12, augment=0.125,
    on_policy=True, distance_decay=0.8, target_weight=1.0, bf16=True,
)  # fmt: skip
DRAFT_LAYERS = 2  # as many as copying takes
DRAFT_STEPS, DRAFT_WARM_UP = 300, 0.8
MEDUSA_HEADS, MEDUSA_STEPS = 4, 400


def split(questions: list[dict], seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Training and held-out questions. Most held-out queries have a paraphrase among the training ones."""
    order = list(range(len(questions)))
    random.Random(seed).shuffle(order)
    held_out = set(order[: round(HELD_OUT * len(questions))])
    return (
        [row for index, row in enumerate(questions) if index not in held_out],
        [row for index, row in enumerate(questions) if index in held_out],
    )


def cross(questions: list[dict], count: int, seed: int = 0) -> list[dict]:
    """Questions nobody asked: in each, one to four words give way to as many of another on the same database.

    What the right query would be is unknown, and often there is none. A target's own answers to them show how it
    answers what it has not learned by heart.
    """
    rng = random.Random(seed)
    of_database: dict[str, list[list[str]]] = {}
    for row in questions:
        of_database.setdefault(row["db_id"], []).append(row["question"].split())
    crossed = []
    for row in rng.choices(questions, k=count):
        words = row["question"].split()
        other = rng.choice(of_database[row["db_id"]])
        size = min(rng.randint(1, 4), len(words), len(other))
        here, there = rng.randint(0, len(words) - size), rng.randint(0, len(other) - size)
        words[here : here + size] = other[there : there + size]
        crossed.append({key: row[key] for key in row if key != "query"} | {"question": " ".join(words)})
    return crossed


class _Schema:
    """Names of one database, in SQL and in words, as the templates need them."""

    def __init__(self, entry: dict):
        self.db_id = entry["db_id"]
        self.tables = list(zip(entry["table_names_original"], entry["table_names"], strict=True))
        self.columns: list[list[tuple[str, str, str]]] = [[] for _ in self.tables]
        for (table, name), (_, words), kind in zip(
            entry["column_names_original"], entry["column_names"], entry["column_types"], strict=True
        ):
            if table >= 0 and " " not in name:
                self.columns[table].append((name.lower(), words.lower(), kind))
        place = {}
        for index, (table, name) in enumerate(entry["column_names_original"]):
            place[index] = (table, name.lower())
        self.joins = [
            (place[a], place[b]) for a, b in entry["foreign_keys"] if place[a][0] != place[b][0]
        ]
        self.usable = [index for index, columns in enumerate(self.columns) if len(columns) >= 2]

    def names(self) -> dict[str, tuple[str, str]]:
        """Of each name in SQL of a table or a column: the words for it, and ``"table"`` or the column's type."""
        tables = ((name.lower(), words.lower(), "table") for name, words in self.tables)
        every = itertools.chain(*self.columns, tables)
        return {name: (words, kind) for name, words, kind in every if name.isidentifier()}


def invent_schemas(schemas: list[dict], count: int, seed: int = 0) -> list[dict]:
    """Schemas of databases that there are not: tables of different databases, with some columns of other tables."""
    rng = random.Random(seed)
    databases = list(map(_Schema, schemas))
    tables = [item for own in databases for item in zip(own.tables, own.columns, strict=True) if item[1]]
    pool = [column for _, columns in tables for column in columns]
    invented = []
    for number in range(count):
        names, columns = [], [(-1, ("*", "*", "text"))]  # in Spider's files the first column is all of them
        for name, own in rng.sample(tables, min(rng.randint(2, 4), len(tables))):
            if name not in names:
                chosen = {new[0]: new for new in (rng.choice((old, rng.choice(pool))) for old in own[:12])}
                columns += [(len(names), column) for column in chosen.values()]
                names.append(name)
        invented.append({
            "db_id": f"db_{number}",
            "table_names_original": [original for original, _ in names],
            "table_names": [words for _, words in names],
            "column_names_original": [[table, original] for table, (original, _, _) in columns],
            "column_names": [[table, words] for table, (_, words, _) in columns],
            "column_types": [kind for _, (_, _, kind) in columns],
            "foreign_keys": [],
        })  # fmt: skip
    return invented


def synthesize(schemas: list[dict], count: int, seed: int = 0) -> list[dict]:
    """Questions made by templates from tables and columns of ``schemas`` (entries of Spider's tables.json)."""
    rng = random.Random(seed)
    databases = [schema for schema in map(_Schema, schemas) if schema.usable]
    rows: dict[tuple[str, str], str] = {}
    for _ in range(20 * count):
        if len(rows) == count:
            break
        schema = rng.choice(databases)
        made = _question(schema, rng)
        if made:
            rows.setdefault((schema.db_id, made[0]), made[1])
    return [{"db_id": db, "question": question, "query": query} for (db, question), query in rows.items()]


def _question(schema: _Schema, rng: random.Random) -> tuple[str, str] | None:
    table = rng.choice(schema.usable)
    name, words = schema.tables[table]
    name = name.lower()
    (a, a_words, _), (b, b_words, _) = rng.sample(schema.columns[table], 2)
    numbers = [column for column in schema.columns[table] if column[2] == "number" and not column[0].endswith("id")]
    show = rng.choice(["show", "list", "find", "give", "return", "what are"])
    mark = "?" if show == "what are" else "."
    kind = rng.randrange(10)
    if kind == 0:
        return rng.choice(
            [f"How many {words} are there?", f"Count the number of {words}."]
        ), f"select count(*) from {name}"
    if kind == 1:
        return f"{show.capitalize()} the {a_words} and {b_words} of all {words}{mark}", f"select {a}, {b} from {name}"
    if kind == 2:
        return f"{show.capitalize()} the different {a_words} of {words}{mark}", f"select distinct {a} from {name}"
    if kind == 3:
        order, direction = rng.choice([("ascending", "asc"), ("descending", "desc")])
        return (
            f"{show.capitalize()} the {a_words} of {words} in {order} order of {b_words}{mark}",
            f"select {a} from {name} order by {b} {direction}",
        )
    if kind == 4:
        return (
            f"How many {words} are there for each {a_words}?",
            f"select {a}, count(*) from {name} group by {a}",
        )
    if kind == 5:
        return (
            f"Which {a_words} has the most {words}?",
            f"select {a} from {name} group by {a} order by count(*) desc limit 1",
        )
    if kind in (6, 7) and numbers:
        n, n_words, _ = rng.choice(numbers)
        if kind == 6:
            phrase, function = rng.choice(
                [("average", "avg"), ("maximum", "max"), ("minimum", "min"), ("total", "sum")]
            )
            return f"What is the {phrase} {n_words} of all {words}?", f"select {function}({n}) from {name}"
        phrase, operator = rng.choice([("above", ">"), ("below", "<")])
        bound = rng.choice([rng.randrange(1, 10), 10 * rng.randrange(1, 10), 1000 * rng.randrange(1, 10)])
        return (
            f"{show.capitalize()} the {a_words} of {words} whose {n_words} is {phrase} {bound}{mark}",
            f"select {a} from {name} where {n} {operator} {bound}",
        )
    if kind >= 8 and schema.joins:
        (left, left_key), (right, right_key) = rng.choice(schema.joins)
        if not (schema.columns[left] and schema.columns[right]):
            return None
        c, c_words, _ = rng.choice(schema.columns[left])
        d, d_words, _ = rng.choice(schema.columns[right])
        (left_name, left_words), (right_name, right_words) = schema.tables[left], schema.tables[right]
        return (
            f"{show.capitalize()} the {c_words} of each {left_words} and the {d_words} of its {right_words}{mark}",
            f"select t1.{c}, t2.{d} from {left_name.lower()} as t1 join {right_name.lower()} as t2 "
            f"on t1.{left_key} = t2.{right_key}",
        )
    return None


def _pieces(question: str) -> set[str]:
    words = [f"^{word}$" for word in _WORD.findall(question.lower())]
    return {word[at : at + size] for word in words for size in _PIECES for at in range(len(word) - size + 1)}


def show_examples(questions: list[dict], pool: list[dict], count: int = EXAMPLES) -> list[dict]:
    """The questions with ``count`` examples of ``pool`` each, which :func:`cllm_kernels.spider.prompt_for` shows: those
    of the same database (or of all, where it has none) that are most alike, the most alike last.

    Likeness is the cosine between TF-IDF vectors of the pieces of words (character n-grams). A question is no example of
    itself, no two examples of one question have the same query, and fewer are shown where there are no more.
    """
    pieces = [_pieces(row["question"]) for row in pool]
    rows_with = collections.Counter(itertools.chain(*pieces))
    weight = {piece: math.log(len(pool) / rows) ** 2 for piece, rows in rows_with.items()}
    norms = [math.sqrt(math.fsum(map(weight.__getitem__, own))) or 1 for own in pieces]
    of_database: dict[str, list[int]] = {}
    for index, row in enumerate(pool):
        of_database.setdefault(row["db_id"], []).append(index)
    shown = []
    for row in questions:
        asked = _pieces(row["question"])
        likeness = {
            index: math.fsum(weight[piece] for piece in pieces[index] & asked) / norms[index]
            for index in of_database.get(row["db_id"], range(len(pool)))
        }
        examples: dict[str, list[str]] = {}
        for index in sorted(likeness, key=lambda index: -likeness[index]):
            other = pool[index]
            if other["question"] != row["question"]:
                examples.setdefault(canonical_sql(other["query"]), [other["question"], other["query"]])
            if len(examples) == count:
                break
        shown.append(row | {"examples": [*examples.values()][::-1]})
    return shown


def _shows_its_query(row: dict) -> bool:
    return canonical_sql(row["query"]) in [canonical_sql(query) for _, query in row["examples"]]


def encipher(rows: list[dict], vocabulary: int, copies: int, seed: int = 0) -> list[dict]:
    """Copies of training rows in which other tokens stand for most tokens, in each row by a cipher of its own.

    What is alike in a row stays alike, and tokens that many outputs have, such as SQL's, stay as they are. So the
    answer cannot be known by heart, but only be found in the prompt: a model learns to look there.
    """
    rng = random.Random(seed)
    found = collections.Counter(token for row in rows for token in set(row["output_ids"]))
    kept = {token for token, count in found.items() if count > COMMON * len(rows)}
    kept |= {row["prompt_ids"][-1] for row in rows}  # the end of a line
    others = [token for token in range(2, vocabulary) if token not in kept]
    enciphered = []
    for row in rows * copies:
        cipher = dict(zip(others, rng.sample(others, len(others)), strict=True))
        texts = {key: [cipher.get(token, token) for token in row[key]] for key in ("prompt_ids", "output_ids")}
        enciphered.append(row | texts)
    return enciphered


def show_schemas(questions: list[dict], schemas: list[dict]) -> list[dict]:
    """The questions with the text of their database's schema, which :func:`cllm_kernels.spider.prompt_for` shows."""
    texts = {entry["db_id"]: schema_text(schema_of(entry).columns) for entry in schemas}
    missing = sorted({row["db_id"] for row in questions} - texts.keys())
    if missing:
        raise ValueError(f"there is no schema of {', '.join(missing[:5])}, which questions are on")
    return [row | {"schema": texts[row["db_id"]]} for row in questions]


def mix_schemas(questions: list[dict], schemas: list[dict], renamed: bool = False, seed: int = 0) -> list[dict]:
    """The questions on other schemas: the tables that their queries name, among tables of other databases.

    Up to ``TOGETHER`` questions of one database share a schema. Tables and columns come in random order, so that a
    model has to look where a name stands instead of learning each database by heart. With ``renamed``, tables and
    columns that the questions name have the names of others besides, in questions, queries and schema.
    """
    rng = random.Random(seed)
    tables = {entry["db_id"]: schema_of(entry).columns for entry in schemas}
    others = [item for own in tables.values() for item in own.items() if item[1]]
    names = {entry["db_id"]: _Schema(entry).names() for entry in schemas} if renamed else {}
    pool: dict[str, list[tuple[str, str]]] = {}
    for own in names.values():
        for sql, (in_words, kind) in own.items():
            pool.setdefault(kind, []).append((sql, in_words))
    of_database: dict[str, list[dict]] = {}
    for row in rng.sample(questions, len(questions)):
        of_database.setdefault(row["db_id"], []).append(row)
    mixed = []
    for name, rows in of_database.items():
        for first in range(0, len(rows), TOGETHER):
            bundle = rows[first : first + TOGETHER]
            words = {word for row in bundle for word in tokenize(row["query"])}
            chosen = {table: columns for table, columns in tables[name].items() if table in words}
            if renamed:
                bundle, new = _rename(bundle, names[name], pool, rng)
                chosen = {new.get(table, table): [new.get(c, c) for c in chosen[table]] for table in chosen}
            for table, columns in rng.sample(others, min(rng.randint(1, 3), len(others))):
                chosen.setdefault(table, columns)
            order = rng.sample(sorted(chosen), len(chosen))
            schema = schema_text({table: rng.sample(chosen[table], len(chosen[table])) for table in order})
            shown = {"db_id": rng.choice((name, "db")), "schema": schema}
            mixed += [row | shown for row in bundle]
    return mixed


def _singular(words: str) -> str:
    return words if words.endswith(("ss", "us")) else words.removesuffix("s")


def _rename(
    rows: list[dict], names: dict[str, tuple[str, str]], pool: dict[str, list[tuple[str, str]]], rng: random.Random
) -> tuple[list[dict], dict[str, str]]:
    """The rows with other names of the same kind for all that the questions name, and the new name in SQL of each old
    one. What a literal holds too keeps its name."""
    text = "\n".join(row["question"].lower() for row in rows)
    literals = "\n".join(token.lower() for row in rows for token in tokenize(row["query"]) if token[0] == "'")
    in_sql, in_words = {}, {}
    for name, (words, kind) in names.items():
        stem = _singular(words)
        if stem not in in_words and stem not in literals and re.search(rf"\b{re.escape(stem)}(?:e?s)?\b", text):
            new, new_words = rng.choice(pool[kind])
            if new not in names and new not in in_sql.values():
                in_sql[name], in_words[stem] = new, _singular(new_words)
    if not in_sql:
        return rows, {}
    longest_first = "|".join(map(re.escape, sorted(in_words, key=len, reverse=True)))
    mention = re.compile(rf"\b({longest_first})(e?s)?\b", re.IGNORECASE)

    def in_question(match: re.Match) -> str:
        words = in_words[match[1].lower()]
        return words + "s" if match[2] and words[-1] != "s" else words

    renamed = []
    for row in rows:
        query = _IDENTIFIER.sub(lambda match: in_sql.get(match[0], match[0]), canonical_sql(row["query"]))
        renamed.append(row | {"question": mention.sub(in_question, row["question"]), "query": query})
    return renamed, in_sql


def tokenizer_for(questions: list[dict]) -> PreTrainedTokenizerFast:
    """A tokenizer of prompts and canonical queries."""
    bare = [{key: row[key] for key in row if key not in ("schema", "examples")} for row in questions]
    texts = [text for row in bare for text in (prompt_for(row), canonical_sql(row["query"]))]
    return make_tokenizer(texts + sorted({row["schema"] for row in questions if "schema" in row}), VOCABULARY)


def encode(questions: list[dict], tokenizer: PreTrainedTokenizerFast) -> list[dict]:
    """Training rows without states, with canonical queries."""
    prompts, queries = [prompt_for(row) for row in questions], [canonical_sql(row["query"]) for row in questions]
    return from_scratch.encode(prompts, queries, tokenizer, prefix_lengths(questions, tokenizer))


def prefix_lengths(questions: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """How many tokens of each prompt are those of its schema; none where it shows no schema."""
    prefixes = [prompt_prefix(row) if "schema" in row else "" for row in questions]
    return list(map(len, tokenizer(prefixes)["input_ids"]))


def load(data: str | Path, schema: bool = False) -> tuple[list[dict], list[dict], list[dict]]:
    """Training questions, held-out questions, and the schemas of the training databases. The questions show these if
    ``schema`` is True, else examples among the training questions."""
    data = Path(data)
    training, held_out = split(read_questions(data / "train.jsonl"))
    if not (training and held_out):
        raise ValueError(f"{data / 'train.jsonl'} has too few questions: {len(training)}, and {len(held_out)} held out")
    databases = {row["db_id"] for row in training}
    schemas = [entry for entry in read_schemas(data / "tables.json") if entry["db_id"] in databases]
    if schema:
        return show_schemas(training, schemas), show_schemas(held_out, schemas), schemas
    return show_examples(training, training), show_examples(held_out, training), schemas


def shows_schemas(target: str | Path) -> bool:
    """Whether a target was trained with the schema in the prompt."""
    path = Path(target) / "training_record.json"
    try:
        return json.loads(path.read_bytes())["data"].get("schema", False)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record of build_target ({type(error).__name__}: {error})") from None


def build_target(data: str | Path, output_dir: str | Path, schema: bool = False) -> dict:
    """Trains the target from scratch on copying, then on real and synthetic questions; returns its training record.

    With ``schema`` the prompts show the schema instead of examples, and the real questions come again on mixed schemas,
    with the names that they have and with others (:func:`mix_schemas`), beside synthetic ones on invented schemas.
    """
    training, held_out, schemas = load(data, schema)
    synthetic = synthesize(schemas, SYNTHETIC)
    synthetic = show_schemas(synthetic, schemas) if schema else show_examples(synthetic, training)
    questions, more = training + synthetic, []
    tokenizer = tokenizer_for(questions)
    if schema:
        config = SCHEMA_CONFIG
        invented = invent_schemas(schemas, INVENTED // TOGETHER)
        more = show_schemas(synthesize(invented, INVENTED, seed=1), invented)
        for seed in range(1 + RENAMED):
            more += mix_schemas(training, schemas, renamed=seed > 0, seed=seed)
        rows = encode(questions + more, tokenizer)
    else:
        config, rng = TARGET_CONFIG, random.Random(0)
        some_bare = [{key: row[key] for key in row if key != "examples" or rng.random() >= BARE} for row in questions]
        shown = encode([row for row in training if _shows_its_query(row)], tokenizer)
        rows = PASSES * encode(some_bare, tokenizer) + encipher(shown, len(tokenizer), CIPHERS)
    notes = {
        "data": {
            "source": "Spider 1.0 train.jsonl (CC BY-SA 4.0)",
            "schema": schema,
            "examples": 0 if schema else EXAMPLES,
            "training_questions": len(training),
            "held_out_questions": len(held_out),
            "synthetic_questions": len(synthetic),
            "questions_on_other_schemas": len(more),
            "passes": 1 if schema else PASSES,
            "ciphers": 0 if schema else CIPHERS,
        }
    }
    model = make_model(tokenizer, config.seed)
    notes["copying"] = learn_to_copy(model, tokenizer)
    return train(model, tokenizer, rows, output_dir, config, notes)


def answers_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, training: list[dict], work: str | Path
) -> tuple[list[dict], dict]:
    """A target's own answers, as training rows, and what collecting them found; they go to ``work/answers.jsonl``.

    To the training questions and to crossed ones: what a model says to questions that it has learned from does not tell
    how it answers new ones.
    """
    questions, path = training + cross(training, CROSSED), Path(work) / "answers.jsonl"
    texts, shared = [prompt_for(row) for row in questions], prefix_lengths(questions, tokenizer)
    return collect_answers(model, tokenizer, texts, path, MAX_NEW_TOKENS, shared)


def build_cllm(data: str | Path, target: str | Path, output_dir: str | Path, work: str | Path) -> dict:
    """Trains the CLLM on the target's own answers (:func:`answers_of`); returns its training record.

    States begin as random drafts and move on with the model that is trained, so the first ones are the target's
    trajectories and the later ones the CLLM's own. The KL to the target holds the clean output.

    A sample of the held-out questions is written beside the CLLM, for the demo.
    """
    training, held_out, _ = load(data, shows_schemas(target))
    if len(held_out) < SAMPLE:
        raise ValueError(f"{data} leaves {len(held_out)} held-out questions; the CLLM's sample takes {SAMPLE}")
    model, tokenizer = load_model(target)
    answers, summary = answers_of(model, tokenizer, training, work)
    notes = {"start": Path(target).name, "answers": summary}
    rows = with_first_states(answers, BLOCK_SIZE)
    record = train(model, tokenizer, rows, output_dir, CLLM_CONFIG, notes, target=load_model(target)[0])
    with open(Path(output_dir) / "held_out_sample.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in random.Random(0).sample(held_out, SAMPLE))
    return record


def build_baselines(data: str | Path, models: str | Path, work: str | Path) -> None:
    """Distils ``spider-draft`` from the target, and trains Medusa-style heads, ``spider-target/medusa.safetensors``, on
    the answers that the CLLM is trained on too (:func:`answers_of`)."""
    models = Path(models)
    training, _, _ = load(data, shows_schemas(models / "spider-target"))
    model, tokenizer = load_model(models / "spider-target")
    rows, _ = answers_of(model, tokenizer, training, work)
    record = distil_draft(model, tokenizer, rows, models / "spider-draft", DRAFT_LAYERS, DRAFT_STEPS, DRAFT_WARM_UP)
    (models / "spider-draft" / "README.md").write_text(draft_card(record))
    train_medusa(model, tokenizer, rows, models / "spider-target" / "medusa.safetensors", MEDUSA_HEADS, MEDUSA_STEPS)


def evaluate_models(data: str | Path, models: str | Path, work: str | Path) -> list[dict]:
    """Evaluates the target, and the CLLM if it is there, on all held-out questions.

    Writes these to ``work/held_out.jsonl``, and Spider's ``dev.jsonl``, whose databases are unknown to the models, to
    ``work/dev.jsonl``, with what the target's prompts show: ``cllm-train evaluate`` takes them.

    Writes ``evaluation.json`` and a model card into each model's folder. Four of five held-out questions have a
    paraphrase with the same query among the training questions; exact match is given for both kinds.
    """
    models, work = Path(models), Path(work)
    schema = shows_schemas(models / "spider-target")
    training, held_out, _ = load(data, schema)
    unknown = read_questions(Path(data) / "dev.jsonl")
    unknown = show_schemas(unknown, read_schemas(Path(data) / "tables.json")) if schema else show_examples(unknown, training)
    work.mkdir(parents=True, exist_ok=True)
    for name, questions in (("held_out", held_out), ("dev", unknown)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    seen = {(row["db_id"], canonical_sql(row["query"])) for row in training}
    kinds = [(row["db_id"], canonical_sql(row["query"])) in seen for row in held_out]
    query_shown = {} if schema else {"query_shown": sum(map(_shows_its_query, held_out)) / len(held_out)}
    paths = {name: path for name in ("target", "cllm") if (path := models / f"spider-{name}").exists()}
    rows = compare_models(paths, held_out, BLOCK_SIZE, MAX_NEW_TOKENS, progress=tqdm_of)
    for row in rows:
        correct = row.pop("correct")
        for key, wanted in (("exact_match_seen_query", True), ("exact_match_new_query", False)):
            flags = [flag for flag, kind in zip(correct, kinds, strict=True) if kind == wanted]
            row[key] = sum(flags) / len(flags)
        row |= query_shown
    for name, path in paths.items():
        own = [row for row in rows if row["model"] == name]
        (path / "evaluation.json").write_text(json.dumps(own, indent=1) + "\n")
        record = json.loads((path / "training_record.json").read_text())
        (path / "README.md").write_text(model_card(name, record, own, schema))
    return rows


_ABOUT = {
    "target": "Trained from scratch on Spider's training questions and on questions made by templates from the "
    "schemas of the same databases.",
    "cllm": "A Consistency LLM (Kou et al. 2024, arXiv 2403.00835) made from `spider-target`: fine-tuned on "
    "Jacobi trajectories, the target's at first and then its own, so that Jacobi decoding needs few forwards. They lead "
    "to the target's answers to the training questions and to questions that were crossed out of two.",
}


_HEAD = ["---", "license: apache-2.0", "library_name: transformers", "pipeline_tag: text-generation", "---"]


def draft_card(record: dict) -> str:
    """The README of the bundled draft model."""
    last = record["history"][-20:]
    return "\n".join([
        *_HEAD,
        "# spider-draft",
        "",
        f"A draft model of {record['parameters'] / 1e6:.1f} million parameters for `spider-target`: its first "
        f"{record['layers']} layers and its embeddings, distilled from it by the forward KL on its answers and then by the "
        f"reverse KL on the draft's own samples ({record['steps']} steps, at the end {sum(last) / len(last):.2f} nats a "
        "token). For transformers' assisted generation, beside which Jacobi decoding is measured. Made by "
        "`cllm-train spider --stage baselines`.",
        "",
        "Data: Spider 1.0 (Yu et al. 2018, Yale), CC BY-SA 4.0.",
        "",
    ])  # fmt: skip


def model_card(name: str, record: dict, evaluation: list[dict], schema: bool = False) -> str:
    """The README of a bundled model: what it is, how it was made, what it does on the held-out questions."""
    prompt, known = (
        "`{db_id} : `, the most similar training question on the same database, its query "
        "(`cllm_trainer.spider.show_examples`), and the question, each in a line of its own",
        "The prompt does not show the schema, so databases outside Spider's training set are unknown to it.",
    )
    if schema:
        prompt, known = "`{db_id} : {schema}`, a newline, `{question}` and a newline", (
            "The prompt shows the schema, as `cllm_kernels.spider.schema_text` writes it."
        )
    lines = [
        *_HEAD,
        f"# spider-{name}",
        "",
        f"A Llama of {record['parameters'] / 1e6:.1f} million parameters that writes SQL for questions on the "
        f"databases of Spider's training set. {_ABOUT[name]}",
        "",
        f"It shows and measures Jacobi decoding; it is no general text-to-SQL model. {known}",
        "",
        f"- Prompt: {prompt}; output: the query in lower case, `<eos>`.",
        f"- Training: {record['steps']} steps on {record['rows']} rows in {record['seconds'] / 60:.0f} minutes on "
        f"{record['threads']} CPU threads; settings and losses in `training_record.json`.",
        "- Made by `make models`, which also wrote this card.",
        "- Data: Spider 1.0 (Yu et al. 2018, Yale), CC BY-SA 4.0; 5 % of the training questions are held out. "
        "`held_out_sample.jsonl`, where it is there, is an excerpt of these under the same licence.",
        "",
        f"On the {evaluation[0]['prompts']} held-out questions, fp32 (`evaluation.json`):",
        "",
        "| method | n | tokens per forward | equal to AR | exact match | of queries seen in training | of new queries "
        "| degenerate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in evaluation:
        lines.append(
            f"| {row['method']} | {row['block_size']} | {row['tokens_per_forward']:.2f} | {row['equal']:.1%} "
            f"| {row['exact_match']:.1%} | {row['exact_match_seen_query']:.1%} | {row['exact_match_new_query']:.1%} "
            f"| {row['degenerate']:.1%} |"
        )
    lines += [
        "",
        "Exact match compares the whole text of the canonical query. A held-out question counts under *queries seen* "
        "if a training question on the same database has the same query in other words. *Degenerate* outputs repeat "
        "an n-gram of up to 4 tokens four times in a row; none is left out of any number.",
        "",
    ]
    if not schema:
        lines += [
            f"The example in the prompt has the right query for {evaluation[0]['query_shown']:.1%} of these questions: "
            "so often would its query be right as it stands.",
            "",
        ]
    return "\n".join(lines)
