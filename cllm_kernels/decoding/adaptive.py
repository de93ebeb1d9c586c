"""Chooses the draft source and the width of the window while decoding, by the tokens per second that each reaches."""

from __future__ import annotations

import dataclasses

# Steps of a trial; the first one is not counted, since its drafts come from another window.
_TRIAL = 4
# What a step's tokens and seconds weigh, one step later: about the last 16 steps count.
_DECAY = 15 / 16
# Steps between two trials: so many at first, then twice as many each time that the choice stays.
_PATIENCE, _LONGEST_PATIENCE = 16, 512


@dataclasses.dataclass
class _Arm:
    source: str
    candidates: int
    width: int
    tokens: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class AdaptiveChoice:
    """The rule: every source, alone and with candidates where there are some, with windows of n, n/2 and n/4 tokens, and
    one token alone, is tried for four steps; what gave the most tokens per second goes on. After 16 steps another one
    gets a trial, in turn, and if the choice stays, the time until the next trial doubles, up to 512 steps. So where
    drafts do not pay, decoding is autoregressive but for four steps in some five hundred.

    Tokens and seconds of a choice are discounted sums over its last steps. What was learnt stays for later prompts, as
    long as the object is kept.

    Args:
        width: full width n.
        sources: names of draft sources, with the most candidates of each.
    """

    def __init__(self, width: int, sources: tuple[tuple[str, int], ...]):
        widths = sorted({width, max(2, width // 2), max(2, width // 4)}, reverse=True)
        self.arms = [_Arm(*source, size) for size in widths for source in sources] + [_Arm(sources[0][0], 1, 1)]
        self._best = 0
        self._current = 0
        self._untried = list(range(1, len(self.arms)))
        self._left = _TRIAL
        self._trial = True
        self._patience = _PATIENCE
        self._following = 0

    def next(self) -> tuple[str, int, int]:
        """Source, candidates and width of the next step."""
        if self._left == 0:
            self._turn()
        arm = self.arms[self._current]
        return arm.source, arm.candidates, arm.width

    def observe(self, accepted: list[int], seconds: float) -> None:
        """What the step did: the accept length of every row that ran, and its wall clock."""
        arm = self.arms[self._current]
        first = self._trial and self._left == _TRIAL
        self._left -= 1
        if first and arm.width > 1:
            return
        arm.tokens = arm.tokens * _DECAY + sum(accepted) / len(accepted)
        arm.seconds = arm.seconds * _DECAY + seconds

    def _turn(self) -> None:
        """Goes from trials to the best choice and back."""
        if self._trial and self._untried:
            self._current = self._untried.pop(0)
            self._left = _TRIAL
            return
        before = self._best
        self._best = max(range(len(self.arms)), key=lambda index: self.arms[index].rate)
        if self._best != before:
            self._patience = _PATIENCE
        if self._trial:
            self._trial, self._current, self._left = False, self._best, self._patience
            self._patience = min(2 * self._patience, _LONGEST_PATIENCE)
            return
        self._following = (self._following + 1) % len(self.arms)
        if self._following == self._best:
            self._following = (self._following + 1) % len(self.arms)
        arm = self.arms[self._following]
        arm.tokens = arm.seconds = 0.0
        self._trial, self._current, self._left = True, self._following, _TRIAL
