"""Several windows for each row in one forward, on one cache: each row goes on with the one that commits most."""

from __future__ import annotations

import dataclasses

import torch

from ..ops import JacobiState
from .config import JacobiConfig
from .drafts import replace_drafts_
from .processing import Processing
from .session import Session, converge


class Branches:
    """Verifies candidate windows as branches behind the committed tokens.

    All read the same cache rows, and each writes its own behind these (see ``branch`` of
    :func:`cllm_kernels.ops.block_attention`). ``converge_`` on a state with a row for each branch tells how many tokens
    each one would commit; the rule is its own, so processors, samples, EOS, limits and blocks count in. The row of the
    decode's state then takes over the window of the branch that commits most (the first one of several), with its
    logits, and the keys and values of what it commits move to where they belong. What happens to the state is what
    would happen if that window had been alone.

    Verifying candidates in parallel: lookahead decoding, Fu et al., 2024, arXiv:2402.02057; with recycled predictions of
    a Consistency LLM: Jacobi Forcing, Hu et al., 2025, arXiv:2512.14681.

    Attributes:
        chosen: how often each branch was chosen, over rows and forwards with candidates; the first one is the window
            that the rows had.
    """

    def __init__(self, session: Session, config: JacobiConfig, processing: Processing, backend: str):
        self.session = session
        self.config = config
        self.processing = processing
        self.backend = backend
        self.chosen = [0] * config.candidates
        self._probes: dict[tuple[int, int, int], _Probe] = {}

    def choose_(self, windows: torch.Tensor, state: JacobiState) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward over windows ``[B, C, n]``, the first ones being the state's; gives each row its best one.

        Returns:
            logits and processed scores of the chosen windows, ``[B, n, V]`` each.
        """
        rows, count, width = windows.shape
        positions = self.session.window_positions(width, count)
        logits = self.session.forward(windows.flatten(1), positions, count * width, width).unflatten(1, (count, width))
        scores = logits
        if self.processing.processors:
            parts = []
            for branch in range(count):  # each with the batch as it is: processors may know rows by their number
                state.window.copy_(windows[:, branch])
                parts.append(self.processing(logits[:, branch], state))
            scores = torch.stack(parts, 1)
            state.window.copy_(windows[:, 0])
        commits = self._commits(scores, windows, state)
        best = [row.index(max(row)) for row in commits]
        for branch, row in zip(best, commits, strict=True):
            self.chosen[branch] += row[branch] > 0  # none where the row is done
        if not any(best):
            return logits[:, 0], scores[:, 0]
        self.session.cache.take_branches(width, best, [row[branch] for branch, row in zip(best, commits, strict=True)])
        if len(set(best)) == 1:  # no copy
            pick = (slice(None), best[0])
        else:
            pick = (torch.arange(rows, device=windows.device), torch.tensor(best, device=windows.device))
        replace_drafts_(state, windows[pick])
        return logits[pick], scores[pick]

    def _commits(self, scores: torch.Tensor, windows: torch.Tensor, state: JacobiState) -> list[list[int]]:
        """How many tokens each branch would commit, ``[B][C]``."""
        probe = self._probes.get(windows.shape)
        if probe is None:
            probe = self._probes[windows.shape] = _Probe(state, windows.shape[1])
        probe.set_(windows)
        converge(
            scores.flatten(0, 1), probe.state, self.config, self.processing, self.backend, self.session.order,
            windows.shape[1],
        )  # fmt: skip
        return probe.gained()


class _Probe:
    """A state with a row for each branch of each row of another state, as far as the accept length depends on it."""

    def __init__(self, of: JacobiState, count: int):
        self.state = dataclasses.replace(
            JacobiState.allocate(of.rows * count, of.width, of.capacity, device=of.device),
            eos=of.eos,
        )
        self.copied = [
            (getattr(self.state, name).view(of.rows, count), getattr(of, name)[:, None])
            for name in ("produced", "limits", "block_left", "done", "seeds")
        ]

    def set_(self, windows: torch.Tensor) -> None:
        """Takes over where the rows stand, with these windows ``[B, C, n]``."""
        self.state.window.copy_(windows.flatten(0, 1))
        for mine, theirs in self.copied:
            mine.copy_(theirs)

    def gained(self) -> list[list[int]]:
        """How many tokens were committed since, ``[B][C]``."""
        produced, before = self.copied[0]
        return (produced - before).tolist()
