"""Spider's exact set match: whether two queries have the same components.

Own code that gives the verdicts of Spider's script (Yu et al. 2018, arXiv 1809.08887) as its test suites have it (Zhong
et al. 2020, arXiv 2010.02840), with that one's defaults. It reads the part of SQL that the script reads; what lies
outside, such as an alias without AS, ``<>``, IS NULL, a list behind IN or brackets around conditions, matches nothing.
As in the script,

* values, the number of LIMIT, DISTINCT, and columns and comparisons in ON are not compared, and columns that a foreign
  key makes equal are the same;
* SELECT, FROM and WHERE are compared without regard to order, GROUP BY, HAVING and ORDER BY with it; of the directions
  in ORDER BY the last one counts for all;
* a query within another must be the same in order, DISTINCT and columns, and within FROM in its values too;
* an alias has one meaning in the whole query, its last; commas in SELECT may be missing; what stands behind a complete
  query is not read, nor what stands behind a column on the right side of a condition.

It differs on purpose where brackets or spaces change nothing: ``a=1`` is read as ``a = 1`` (the script needs the
spaces), and ``(count(*))`` in SELECT is ``count(*)``. The script also replaces ``value`` in predictions by ``1``, for
models that do not write values; here a prediction stays as it is.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from cllm_kernels.spider import canonical_sql

_TOKEN = re.compile(r"'(?:[^']|'')*'|[<>!]=|[()<>=,;']|[^\s()<>=,;']+")
NUMBER = re.compile(r"-?\d*\.?\d+")
_AGGREGATES = ("count", "sum", "avg", "min", "max")
_COMPARISONS = ("=", "!=", "<", ">", "<=", ">=", "in", "like", "between", "is")
_SET_OPERATORS = ("union", "intersect", "except")
_CLAUSES = ("select", "from", "where", "group", "order", "limit", *_SET_OPERATORS)
_CLAUSE_ENDS = (*_CLAUSES, ")", ";", "")
_CONDITION_ENDS = (*_CLAUSE_ENDS, "join", "on", "as")
_VALUE_ENDS = (*_CONDITION_ENDS, "and", ",")


def tokenize(query: str) -> list[str]:
    """Tokens of a query in lower case; a literal is one, in ``'`` quotes."""
    return _TOKEN.findall(canonical_sql(query))


class Schema(NamedTuple):
    """What exact set match takes from a database, in lower case.

    ``columns`` are those of each table; ``equal`` leads from each ``table.column`` in a foreign key to the first of
    all that are equal to it.
    """

    columns: dict[str, list[str]]
    equal: dict[str, str]


def schema_of(entry: dict) -> Schema:
    """The schema in an entry of Spider's ``tables.json``."""
    tables = [name.lower() for name in entry["table_names_original"]]
    columns: dict[str, list[str]] = {table: [] for table in tables}
    names = []
    for table, name in entry["column_names_original"]:
        names.append(f"{tables[table]}.{name.lower()}")
        if table >= 0:
            columns[tables[table]].append(name.lower())
    groups: list[set[int]] = []
    for pair in entry.get("foreign_keys", []):
        group = next((group for group in groups if not group.isdisjoint(pair)), None)
        if group is None:
            groups.append(group := set())
        group.update(pair)
    return Schema(columns, {names[index]: names[min(group)] for group in groups for index in group})


def read_schemas(path: str | Path) -> list[dict]:
    """The entries of a file like Spider's ``tables.json``.

    Raises:
        ValueError: it does not hold schemas.
    """
    try:
        entries = json.loads(Path(path).read_bytes())
        for entry in entries:
            schema_of(entry)
            if not len(entry["column_types"]) == len(entry["column_names_original"]) or not isinstance(entry["db_id"], str):
                raise ValueError(f"{entry['db_id']!r} has {len(entry['column_types'])} column_types")
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no schemas like those of Spider's tables.json ({type(error).__name__}: {error})") from None
    return entries


class _Conditions(NamedTuple):
    """Conditions ``(comparison, left side, values)``, and the ``and`` and ``or`` between them."""

    terms: tuple = ()
    links: tuple = ()


class _Query(NamedTuple):
    distinct: bool
    select: tuple
    tables: tuple
    on: _Conditions
    where: _Conditions
    group: tuple
    having: _Conditions
    order: tuple
    limit: bool
    operation: tuple  # a set operator and the query behind it


class _Parser:
    """Reads a query; ValueError where it cannot, IndexError where the query breaks off."""

    def __init__(self, text: str, schema: Schema | None):
        self.tokens = tokenize(text)
        self.at = 0
        self.schema = schema
        found = [index for index, token in enumerate(self.tokens) if token == "as"]
        self.aliases = {self.tokens[index + 1]: self.tokens[index - 1] for index in found}
        self.outer: set[str] | None = None  # the tables of the first FROM: the foreign keys of others do not count
        self.nested = self.literal = False
        if any("'" in token[1:-1] or token == "'" for token in self.tokens):
            raise ValueError("quotes within quotes")
        if schema and not self.aliases.keys().isdisjoint(schema.columns):
            raise ValueError("a table's name as alias")

    def peek(self) -> str:
        """The next token; at the end, none."""
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def next(self) -> str:
        token = self.tokens[self.at]
        self.at += 1
        return token

    def take(self, token: str) -> bool:
        """Whether ``token`` is next; it is passed over."""
        found = self.peek() == token
        self.at += found
        return found

    def expect(self, token: str) -> None:
        if self.next() != token:
            raise ValueError(f"no {token}")

    def query(self) -> _Query:
        bracket = self.take("(")
        self.expect("select")
        select_at = self.at
        self.at = self.tokens.index("from", self.at) + 1  # first, since it says whose columns SELECT names
        tables, on = self._from()
        scope = [table for table in tables if isinstance(table, str)]
        if not self.nested and self.outer is None:
            self.outer = set(scope)
        end, self.at = self.at, select_at
        distinct = self.take("distinct")
        select = []
        while self.peek() not in _CLAUSES:
            select.append(self._unit(scope))
            self.take(",")
        self.at = end
        where = self._conditions(scope) if self.take("where") else _Conditions()
        group = self._keys(scope)[1] if self.take("group") else ()
        having = self._conditions(scope) if self.take("having") else _Conditions()
        order = self._keys(scope, ("asc", "desc")) if self.take("order") else ()
        limit = self.take("limit") and bool(self.next())
        if bracket:
            self.expect(")")
        operation = (self.next(), self.query()) if self.peek() in _SET_OPERATORS else ()
        return _Query(distinct, tuple(select), tables, on, where, group, having, order, limit, operation)

    def _inner(self, literal: bool) -> _Query:
        """A query within another; with ``literal``, the values in it are compared."""
        saved = self.nested, self.literal
        self.nested, self.literal = True, self.literal or literal
        query = self.query()
        self.nested, self.literal = saved
        return query

    def _from(self) -> tuple[tuple, _Conditions]:
        tables: list[str | _Query] = []
        on = _Conditions()
        while self.peek() not in _CLAUSE_ENDS or not tables:
            self.take("join")
            if self.take("("):
                tables.append(self._inner(literal=True))
                self.expect(")")
            else:
                token = self.next()
                tables.append(self._known(self.aliases.get(token, token)))
                if self.take("as"):
                    self.next()
            if self.take("on"):
                more = self._conditions([table for table in tables if isinstance(table, str)])
                on = _Conditions(on.terms + more.terms, on.links + more.links)
        return tuple(tables), on

    def _known(self, table: str, column: str | None = None) -> str:
        """``table``, or ``table.column``, where they exist."""
        name = table if column is None else column
        if self.schema:
            known = table in self.schema.columns and column in (None, *self.schema.columns[table])
        else:
            known = name not in _VALUE_ENDS and re.match(r"\w", name) is not None
        if not known:
            raise ValueError(f"no table or column {name}")
        return name if column is None else f"{table}.{column}"

    def _column(self, scope: list[str]) -> str:
        token = self.next()
        if token == "*":
            return token
        if "." in token:
            table, name = token.split(".")
            table = self.aliases.get(table, table)
        elif self.schema:
            table, name = next((table for table in scope if token in self.schema.columns[table]), ""), token
        else:
            table, name = scope[0] if len(scope) == 1 else "", token
        column = self._known(table, name)
        if self.schema and not self.nested and table in (self.outer or ()):
            column = self.schema.equal.get(column, column)
        return column

    def _term(self, scope: list[str]) -> tuple:
        """A column, or an aggregate of one."""
        aggregate = self.next() if self.peek() in _AGGREGATES else ""
        if self.take("("):
            term = self._unit(scope)
            self.expect(")")
            return (aggregate, term) if aggregate else term
        if aggregate:
            raise ValueError(f"nothing to {aggregate}")
        distinct = self.take("distinct") and self.nested
        return distinct, self._column(scope)

    def _unit(self, scope: list[str]) -> tuple:
        """A term, or arithmetic on terms."""
        term = self._term(scope)
        return (term, self.next(), self._unit(scope)) if self.peek() in ("+", "-", "*", "/") else term

    def _value(self, scope: list[str]) -> object:
        """The right side of a condition: a query, or what the literal or column is where that is compared."""
        bracket = self.take("(")
        value: object
        if self.peek() == "select":
            value = self._inner(self.literal)
        elif self.peek()[:1] == "'":
            value = self.next()
        elif NUMBER.fullmatch(self.peek()):
            value = float(self.next())
        else:
            value = self._term(scope)
            while self.peek() not in _VALUE_ENDS:  # the script passes over these too
                self.at += 1
        if bracket:
            self.expect(")")
        return value if self.literal or isinstance(value, _Query) else None

    def _conditions(self, scope: list[str]) -> _Conditions:
        terms, links = [], []
        while self.peek():
            left = self._unit(scope)
            negation = "not " if self.take("not") else ""
            comparison = self.next()
            if comparison not in _COMPARISONS:
                raise ValueError(f"{comparison} is no comparison")
            values = [self._value(scope)]
            if comparison == "between":
                self.expect("and")
                values.append(self._value(scope))
            terms.append((negation + comparison, left, *values))
            if self.peek() not in ("and", "or"):
                break
            links.append(self.next())
        if self.peek() not in _CONDITION_ENDS:
            raise ValueError(f"{self.peek()} behind a condition")
        return _Conditions(tuple(terms), tuple(links))

    def _keys(self, scope: list[str], directions: tuple[str, ...] = ()) -> tuple[str, tuple]:
        """The last direction and the units behind ``group by`` or ``order by``."""
        self.expect("by")
        direction, units = "asc", []
        while True:
            units.append(self._unit(scope))
            if self.peek() in directions:
                direction = self.next()
            if not self.take(","):
                return direction, tuple(units)


def _components(query: _Query) -> tuple:
    """What is compared of a query that is in no other."""
    conditions = (query.on, query.where, query.having)
    words = " ".join(text for part in conditions for text in (*part.links, *(term[0] for term in part.terms))).split()
    return (
        Counter(query.select),
        Counter(query.tables),
        Counter(query.where.terms),
        set(query.where.links),
        query.group,
        query.having if query.group else bool(query.having.terms),
        query.order,
        query.limit,
        {"or", "not", "in", "like"}.intersection(words),
        query.operation and (query.operation[0], _components(query.operation[1])),
    )


def exact_set_match(output: str, query: str, schema: Schema | None = None) -> bool | None:
    """Whether both queries have the same components. An ``output`` that cannot be read matches nothing.

    None where ``query`` itself cannot be read, so that nothing can be said (the script stops there).

    Args:
        schema: the database's. Without one, any word may be a table or a column, no columns are equal by foreign keys,
            and a bare column of a join is none of the qualified ones.
    """
    wanted = _read(query, schema)
    return None if wanted is None else _read(output, schema) == wanted


def _read(text: str, schema: Schema | None) -> tuple | None:
    try:
        return _components(_Parser(text, schema).query())
    except (ValueError, IndexError, RecursionError):
        return None
