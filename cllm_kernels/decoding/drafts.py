"""The n-gram draft source: what followed the last tokens before is guessed to follow them again."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator

import torch

from ..ops import JacobiState

# Tokens of the n-grams that are looked up, in that order.
SIZES = (8, 4, 2)
# Of rejected predictions, which are less often right, so many tokens must agree.
RECYCLED = 3
# Places that are looked at for each n-gram, the latest first.
_PLACES = 8
# What a step weighs, one step later.
_DECAY = 0.95


@dataclasses.dataclass
class LoneToken:
    """Whether to look up one token alone, where no n-gram is found: only where what followed it last is right more often
    than the draft that stands there.

    On texts that a model repeats or copies it is, and against the random drafts and poor predictions of a model that is
    no CLLM; a CLLM's predictions are the better ones. So the two are compared in every step in which they differ, and
    steps count for less the longer ago they are.
    """

    score: float = 0.0

    @property
    def pays(self) -> bool:
        return self.score > 0

    def observe(self, token: int, found: int, draft: int) -> None:
        """What a step committed, and the two guesses at it."""
        if found != draft:
            self.score = _DECAY * self.score + (token == found) - (token == draft)


class _Row:
    """Tokens of one row, and where its n-grams occurred in them or in rejected predictions."""

    def __init__(self, tokens: list[int], lone: LoneToken):
        self.lone = lone
        self.tokens: list[int] = []
        self.text = ""  # a character for each token: strings are searched much faster than an index of n-grams is made
        # rejected predictions, with the place in them behind each n-gram
        self.recycled: dict[tuple[int, ...], list[tuple[list[int], int]]] = defaultdict(list)
        # what followed the last token before, and what the window has for the next one; None where either is missing
        self.guesses: tuple[int, int] | None = None
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.text += "".join(map(chr, tokens))

    def recycle(self, predictions: list[int]) -> None:
        for end in range(RECYCLED, len(predictions)):
            self.recycled[tuple(predictions[end - RECYCLED : end])].append((predictions, end))

    def continuations(self, drafts: list[int], most: int) -> list[list[int]]:
        """At most ``most`` ways to go on, each of at most as many tokens as ``drafts`` has; the best guess first.

        None is the beginning of the drafts, or of one before it.
        """
        found: list[list[int]] = []
        for tokens in self._continuations(len(drafts)):
            if all(other[: len(tokens)] != tokens for other in (drafts, *found)):
                found.append(tokens)
                if len(found) == most:
                    break
        return found

    def _continuations(self, count: int) -> Iterator[list[int]]:
        for size in SIZES:
            yield from self._behind(size, count)
        recycled = self.recycled.get(tuple(self.tokens[-RECYCLED:]), ())
        for predictions, end in itertools.islice(reversed(recycled), _PLACES):
            yield predictions[end : end + count]
        if self.lone.pays:
            yield from self._behind(1, count)

    def _behind(self, size: int, count: int) -> Iterator[list[int]]:
        """What followed the last ``size`` tokens, the latest place first."""
        for place in self._places(size):
            tokens = self.tokens[place : place + count]
            # A repetition whose end is not known yet goes on as it began.
            period = len(self.tokens) - place
            while len(tokens) < count:
                tokens.append(tokens[len(tokens) - period])
            yield tokens

    def _places(self, size: int) -> Iterator[int]:
        """The places behind the last ``size`` tokens where these stood before, the latest first."""
        gram, end = self.text[-size:], len(self.text) - 1  # what stands at the end does not find itself
        for _ in range(_PLACES):
            found = self.text.rfind(gram, 0, end)
            if found < 0:
                return
            yield found + size
            end = found + size - 1  # they may overlap

    def guess(self, drafts: list[int]) -> None:
        """Takes down what `lone` compares when the step is done."""
        place = next(self._places(1), None)
        self.guesses = (self.tokens[place], drafts[0]) if place is not None and drafts else None


class LookupDrafts:
    """Prompt lookup, and an n-gram pool of what was committed and of predictions that were rejected.

    Where the last tokens of a row occurred before, the tokens behind that place become the drafts; else, where they
    occurred in a rejected prediction, what followed them there; else what followed the last token alone, where that pays;
    else the drafts of Jacobi decoding stay. Longer n-grams come first, then later places. Prompt lookup: Saxena, 2023; a
    pool of rejected n-grams: Fu et al., 2024, arXiv:2402.02057. It reads what was committed on the host, after every
    iteration.

    Args:
        prompt: int64 ``[B, P]``, left padded.
        starts: first valid column of each row.
        order: which row of the prompt each row of a state is, looked up in every call; None where all stay in place.
        lone: what earlier prompts taught, which each row begins with; None begins anew.
    """

    def __init__(
        self, prompt: torch.Tensor, starts: list[int], order: list[int] | None = None, lone: LoneToken | None = None
    ):
        score = 0.0 if lone is None else lone.score
        self.rows = [_Row(row[start:], LoneToken(score)) for row, start in zip(prompt.tolist(), starts, strict=True)]
        self.produced = [0] * len(self.rows)
        self.order = list(range(len(self.rows))) if order is None else order

    def learnt(self) -> float:
        """The score of `LoneToken` that the next prompt begins with."""
        return statistics.fmean(row.lone.score for row in self.rows)

    def observe(self, state: JacobiState) -> None:
        """Takes in what the last step committed and what it predicted behind that."""
        done, windows, since = state.done.tolist(), state.window.tolist(), state.since.tolist()
        iterations = state.iterations.tolist()
        for index, new in enumerate(state.produced.tolist()):
            place = self.order[index]
            row, old = self.rows[place], self.produced[place]
            if new == old:
                continue
            tokens = state.output[index, old:new].tolist()
            if row.guesses is not None:
                row.lone.observe(tokens[0], *row.guesses)
                row.guesses = None
            row.extend(tokens)
            if not done[index]:
                # refilled drafts are no predictions
                now = iterations[index]
                row.recycle([token for token, at in zip(windows[index], since[index], strict=True) if at <= now])
            self.produced[place] = new

    def _continuations(self, windows: list[list[int]], state: JacobiState, most: int) -> list[list[list[int]]]:
        return [
            [] if done else self.rows[place].continuations(window[1:], most)
            for place, window, done in zip(self.order, windows, state.done.tolist(), strict=False)
        ]

    def propose_(self, state: JacobiState) -> None:
        """Replaces drafts of the window where an n-gram is found."""
        windows = state.window.tolist()
        for place, window in zip(self.order, windows, strict=False):
            self.rows[place].guess(window[1:])
        found = self._continuations(windows, state, 1)
        if any(found):
            windows = [_with_drafts(window, *best) for window, best in zip(windows, found, strict=True)]
            replace_drafts_(state, torch.tensor(windows, device=state.device))

    def candidates(self, state: JacobiState, most: int) -> torch.Tensor | None:
        """At most ``most`` windows for each row, int64 ``[B, C, n]``: the state's, then others out of the pool.

        As many as the row has for which most are found; others repeat their window. None where nothing is found.
        """
        windows = state.window.tolist()
        found = self._continuations(windows, state, most - 1)
        count = max(map(len, found))
        if count == 0:
            return None
        return torch.tensor(
            [
                [window, *(_with_drafts(window, tokens) for tokens in row), *[window] * (count - len(row))]
                for window, row in zip(windows, found, strict=True)
            ],
            device=state.device,
        )


def _with_drafts(window: list[int], drafts: list[int] = ()) -> list[int]:
    """The window with these drafts in the place of its first ones."""
    return [window[0], *drafts, *window[1 + len(drafts) :]]


def replace_drafts_(state: JacobiState, windows: torch.Tensor) -> None:
    """Makes ``windows``, int64 ``[B, n]``, those of the state. Drafts that change count as refilled ones."""
    new = windows != state.window
    state.window.copy_(windows)
    state.kept.masked_fill_(new, 0)
    state.since.copy_(torch.where(new, state.iterations[:, None] + 1, state.since))
