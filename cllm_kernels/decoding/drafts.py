"""The n-gram draft source: what followed the last tokens before is guessed to follow them again."""

from __future__ import annotations

import torch

from ..ops import JacobiState

# Longest and shortest n-gram that is looked up. With one token alone, what followed it last is too often wrong.
LONGEST, SHORTEST = 4, 2


class _Row:
    """Tokens of one row, with the place behind the latest occurrence of each n-gram."""

    def __init__(self, tokens: list[int]):
        self.tokens: list[int] = []
        self.places: dict[tuple[int, ...], int] = {}
        # continuations of n-grams of rejected predictions
        self.recycled: dict[tuple[int, ...], list[int]] = {}
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            # Only now does something follow the n-grams that end here, so a suffix never finds itself.
            end = len(self.tokens)
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self.places[tuple(self.tokens[end - size :])] = end
            self.tokens.append(token)

    def recycle(self, predictions: list[int]) -> None:
        for end in range(SHORTEST, len(predictions)):
            self.recycled[tuple(predictions[end - SHORTEST : end])] = predictions[end:]

    def continuation(self, count: int) -> list[int]:
        """At most `count` tokens that may follow; none where nothing is found."""
        for size in range(min(LONGEST, len(self.tokens)), SHORTEST - 1, -1):
            place = self.places.get(tuple(self.tokens[-size:]))
            if place is not None:
                found = self.tokens[place : place + count]
                # A repetition whose end is not known yet goes on as it began.
                period = len(self.tokens) - place
                while len(found) < count:
                    found.append(found[len(found) - period])
                return found
        return self.recycled.get(tuple(self.tokens[-SHORTEST:]), [])[:count]


class LookupDrafts:
    """Prompt lookup, and an n-gram pool of what was committed and of predictions that were rejected.

    Where the last tokens of a row occurred before, the tokens behind that place become the drafts; else, where they
    occurred in a rejected prediction, what followed them there; else the drafts of Jacobi decoding stay. Prompt
    lookup: Saxena, 2023; a pool of rejected n-grams: Fu et al., 2024, arXiv:2402.02057. It reads what was committed on
    the host, after every iteration.

    Args:
        prompt: int64 ``[B, P]``, left padded.
        starts: first valid column of each row.
    """

    def __init__(self, prompt: torch.Tensor, starts: list[int]):
        self.rows = [_Row(row[start:]) for row, start in zip(prompt.tolist(), starts, strict=True)]
        self.produced = [0] * len(self.rows)

    def observe(self, state: JacobiState) -> None:
        """Takes in what the last step committed and what it predicted behind that."""
        produced, done = state.produced.tolist(), state.done.tolist()
        for index, row in enumerate(self.rows):
            if produced[index] > self.produced[index]:
                row.extend(state.output[index, self.produced[index] : produced[index]].tolist())
                if not done[index]:
                    # refilled drafts are no predictions
                    predicted = state.since[index] <= state.iterations[index]
                    row.recycle(state.window[index][predicted].tolist())
                self.produced[index] = produced[index]

    def propose_(self, state: JacobiState) -> None:
        """Replaces drafts of the window where an n-gram is found."""
        window = state.window.tolist()
        changed = False
        for row, drafts, done in zip(self.rows, window, state.done.tolist(), strict=True):
            found = [] if done else row.continuation(state.width - 1)
            if found:
                drafts[1 : 1 + len(found)] = found
                changed = True
        if changed:
            drafts = torch.tensor(window).to(state.window.device)
            new = drafts != state.window
            state.window.copy_(drafts)
            state.kept.masked_fill_(new, 0)
            state.since.copy_(torch.where(new, state.iterations[:, None] + 1, state.since))
