"""The Jacobi loop: forward over the window, then ``converge_``, until every row is done."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch

from ..ops import JacobiState
from .adaptive import AdaptiveChoice
from .branches import Branches
from .config import JacobiConfig
from .drafts import LoneToken, LookupDrafts
from .processing import Processing, Stopping
from .session import Session, check_status, converge, run_chunks, runs_on_device, single_steps, waits_for_host
from .statistics import JacobiStatistics, RowStatistics

_STOP_REASONS = {1: "eos", 2: "length", 3: "criterion"}


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What :func:`decode` returns.

    Attributes:
        tokens: a list of committed token ids for each row, EOS included.
        trajectory: for each row the windows it went through, ``[start, drafts]`` with ``start`` committed
            tokens and the n - 1 drafts that stood behind them; None unless the configuration asks for it.
        scores, logits: float32 ``[B, V]`` for each new token, processed and as the model gave them, zeros for rows
            that have ended; None unless asked for.
    """

    tokens: list[list[int]]
    statistics: JacobiStatistics
    trajectory: list[list[tuple[int, list[int]]]] | None
    scores: tuple[torch.Tensor, ...] | None
    logits: tuple[torch.Tensor, ...] | None


def decode(
    session: Session,
    prompt: torch.Tensor,
    config: JacobiConfig,
    backend: str,
    processing: Processing,
    choices: dict[int, AdaptiveChoice] | None = None,
    lone: LoneToken | None = None,
    stopping: Stopping | None = None,
    keep_scores: bool = False,
    keep_logits: bool = False,
    on_commit: Callable[[list[int]], None] | None = None,
) -> Decoded:
    """Decodes all rows of the session's state to their end.

    The forward of a prompt holds the first window too, so that even the prefill commits more than one token where the
    drafts are right. Rows that wait (see ``Session.most``) take the places of rows that have ended. On the CPU, the host
    reads two integers per iteration: how many rows still run, and how many have NaN logits. On CUDA devices it reads them
    later, see :func:`run_chunks`, unless an option needs the host in every iteration, or rows wait; then an iteration is a
    graph, where its shape stays.

    Args:
        session: with a state for this prompt, drafts drawn and no token committed.
        prompt: int64 ``[B, P]``, left padded.
        backend: of ``converge_``, resolved.
        processing: of the logits.
        choices: what earlier calls learnt, where the configuration adapts; None begins anew. There is one choice for 1,
            2, up to 4, up to 8 … rows, since a step's cost depends on their number.
        lone: what earlier calls learnt, where drafts are looked up; None begins anew.
        stopping: criteria besides EOS and length; None for none.
        keep_scores, keep_logits: whether to return them.
        on_commit: called with the newly committed tokens of row 0 after every iteration.

    Raises:
        ValueError: the model gave NaN logits.
    """
    state, forward = session.state, session.forward
    width = prompt.shape[1]
    lengths, starts = session.bounds.unbind()
    windows = _Windows(session)
    choices = {} if choices is None else choices
    choice = None
    lookup = LookupDrafts(prompt, starts.tolist(), session.order, lone) if config.looks_up else None
    branches = Branches(session, config, processing, backend) if config.candidates > 1 else None
    source, candidates = config.sources[0]
    records: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
    streamed = 0

    def record() -> None:
        if config.record_trajectory:
            alive = (state.done == 0).nonzero()[:, 0]
            rows = [session.order[slot] for slot in alive.tolist()]
            records.append((rows, state.produced[alive], state.window[alive, 1:]))

    def stream(produced: int, output: torch.Tensor) -> None:
        nonlocal streamed
        on_commit(output[streamed:produced].tolist())
        streamed = produced

    kept_scores = _Kept(state) if keep_scores else None
    kept_logits = _Kept(state) if keep_logits else None
    looks = stopping is not None or keep_scores or keep_logits

    def advance(logits: torch.Tensor, scores: torch.Tensor) -> int:
        commit = functools.partial(converge, scores, state, config, processing, backend, session.order)
        if looks:
            produced = state.produced.tolist()
            before = state.clone() if stopping is not None else None
            commit()
            for kept, values in ((kept_scores, scores), (kept_logits, logits)):
                if kept is not None:
                    kept.add(values, produced)
            if stopping is not None:
                _stop(stopping.stops(produced, state, kept_scores and kept_scores.columns), state, before, commit)
        else:
            commit()
        return committed()

    def committed() -> int:
        running, broken = state.status.tolist()
        check_status(broken)
        if on_commit is not None:
            stream(int(state.produced[0]), state.output[0])
        if lookup is not None:
            lookup.observe(state)
        return running

    steps: dict[tuple[str, int], int] = {}
    prefills, prefill_tokens, prefill_seconds = 0, 0, 0.0

    def prefill(rows: int) -> int:
        """Runs the prompts of the first rows with their first windows; returns how many of these rows go on."""
        nonlocal state, prefills, prefill_tokens, prefill_seconds
        started = time.perf_counter()
        running_on, state = state, windows.current.first(rows)
        if source == "lookup":
            lookup.propose_(state)
        record()
        n, pads = state.width, starts[:rows]
        skipped = int(pads.min())  # columns that are padding in each of them
        pads -= skipped
        input_ids = torch.cat((prompt[session.order[:rows], skipped:-1], state.window), dim=1)
        positions = torch.arange(width - 1 - skipped + n, device=prompt.device) - pads[:, None]
        lengths[:rows] = 0
        logits = forward(input_ids, positions.clamp_(0, session.limit), n)
        lengths[:rows] = width - 1 - skipped
        running = advance(logits, processing(logits, state))
        steps[source, n] = steps.get((source, n), 0) + 1
        prefills += 1
        prefill_tokens += int(state.produced.sum())
        prefill_seconds += time.perf_counter() - started
        state = running_on
        return running

    begin = time.perf_counter()
    waiting = session.whole.rows - state.rows
    running = prefill(state.rows)

    graphs = session.capturable and runs_on_device(state.device, config, processing) and not looks
    hosted = waits_for_host(config) or waiting > 0
    if running and graphs and not hosted:
        ran = run_chunks(session, config, processing, backend, stream if on_commit is not None else None)
        steps[source, state.width] += ran
        running = int(state.status[0])
        if on_commit is not None:
            stream(int(state.produced[0]), state.output[0])
    single = single_steps(session, config, processing, backend) if graphs and hosted else None
    # Finished rows leave the batch where nobody outside knows rows by their number, and no graph has their addresses.
    shrinks = session.cache is not None and processing.vectorised and not looks and single is None
    n = state.width
    while running or waiting:
        # A few prompts cost a forward as many do, and where rows have left, the others' forward costs less.
        if waiting and session.most - running >= min(waiting, (session.most + 1) // 2):
            admitted = windows.admit()
            waiting -= admitted
            running += prefill(admitted)
            state = windows.at(windows.current.width)
            continue
        if shrinks and running < state.rows:
            state = windows.drop_finished()
        if config.adapts:
            started = time.perf_counter()
            rows = 1 << (state.rows - 1).bit_length()
            choice = choices.get(rows) or choices.setdefault(rows, AdaptiveChoice(config.width, config.sources))
            source, candidates, n = choice.next()
            state = windows.at(n)
            produced = state.produced.tolist()
        if source == "lookup":
            lookup.propose_(state)
        record()
        several = lookup.candidates(state, candidates) if candidates > 1 else None
        if several is not None:
            running = advance(*branches.choose_(several, state))
        elif single is not None:
            single()
            running = committed()
        else:
            logits = forward(state.window, session.window_positions(n), n)
            running = advance(logits, processing(logits, state))
        step = (source if several is None else f"{source} x {several.shape[1]}", n)
        if choice is not None:
            accepted = [new - old for old, new in zip(produced, state.produced.tolist(), strict=True) if new > old]
            choice.observe(accepted, time.perf_counter() - started)
        steps[step] = steps.get(step, 0) + 1
    end = time.perf_counter()
    if lone is not None and lookup is not None:
        lone.score = lookup.learnt()

    state = session.whole
    produced = state.produced.tolist()
    place = sorted(range(len(produced)), key=session.order.__getitem__)
    output = state.output.tolist()
    row_statistics = _row_statistics(state, windows.accept_histogram())
    return Decoded(
        tokens=[output[row][: produced[row]] for row in place],
        statistics=JacobiStatistics(
            rows=tuple(row_statistics[row] for row in place),
            forwards=sum(steps.values()),
            steps=steps,
            chosen=tuple(branches.chosen) if branches is not None else (),
            block_size=config.width,
            mode=config.mode,
            draft=config.draft,
            backend=backend,
            prefill_forwards=prefills,
            prefill_tokens=prefill_tokens,
            prefill_seconds=prefill_seconds,
            decode_seconds=end - begin - prefill_seconds,
            processor_calls=processing.calls,
            processor_seconds=processing.seconds,
        ),
        trajectory=_trajectory(records, len(produced)) if config.record_trajectory else None,
        scores=kept_scores and kept_scores.columns(),
        logits=kept_logits and kept_logits.columns(),
    )


def _stop(
    stops: dict[int, int], state: JacobiState, before: JacobiState, commit: Callable[[], None]
) -> None:
    """Ends rows after so many new tokens. Where a step committed more, it is taken again with that limit."""
    if not stops:
        return
    produced = state.produced.tolist()
    if any(count < produced[row] for row, count in stops.items()):
        state.copy_(before)
        for row, count in stops.items():
            state.limits[row] = min(count, int(state.limits[row]))
        commit()
    for row in stops:
        if state.done[row] != 1:
            state.done[row] = 3
    state.status[0] = (state.done == 0).sum()


class _Windows:
    """The state at every width that is used; all share everything but the window, what belongs to it and the histogram.

    Here the states have all rows; decoding goes on with the first ones of them, those of the session's state.
    """

    def __init__(self, session: Session):
        self.session = session
        self.current = self.full = session.whole
        self._states = {self.full.width: self.full}
        self._running = {self.full.width: session.state}
        self._left_at = {}

    def _by_row(self) -> list[torch.Tensor]:
        """What has a row for each of the batch besides the full state."""
        own = [
            getattr(state, name)
            for state in self._states.values() if state is not self.full
            for name in ("window", "kept", "since", "accept_histogram")
        ]  # fmt: skip
        return [*own, *self._left_at.values()]

    def drop_finished(self) -> JacobiState:
        """Goes on with the running rows alone."""
        self._running = {self.full.width: self.session.drop_finished(self._by_row())}
        return self.at(self.current.width)

    def admit(self) -> int:
        """Gives the places of finished rows to rows that wait; returns how many, which are the first ones then."""
        count = self.session.admit(self._by_row())
        self._running = {self.full.width: self.session.state}
        return count

    def at(self, width: int) -> JacobiState:
        """Goes on with a window of that width."""
        if width != self.current.width:
            self._change_to(width)
        state = self._running.get(width)
        if state is None:
            state = self._running[width] = self.current.first(self.session.state.rows)
        return state

    def _change_to(self, width: int) -> None:
        """Narrower windows are cut off, wider ones get back what they had."""
        old = self.current
        self._left_at[old.width] = old.produced.clone()
        new = self._states.get(width)
        if new is None:
            new = self._states[width] = dataclasses.replace(
                old,
                block_left=torch.full_like(old.block_left, width),
                accept_histogram=old.accept_histogram.new_zeros(old.rows, width + 1),
                **{
                    name: getattr(self.full, name)[:, :width].clone(memory_format=torch.contiguous_format)
                    for name in ("window", "kept", "since")
                },
            )
            self._left_at[width] = self._left_at[self.full.width].clone()
        if width > old.width:
            # What the wider window held when it was left, moved on by what was committed since; it may be all wrong.
            moved = new.produced - self._left_at[width]
            columns = (torch.arange(width, device=moved.device) + moved[:, None]).clamp(max=width - 1)
            new.window.copy_(new.window.gather(1, columns))
            new.kept.zero_()
            new.since.copy_((new.iterations + 1)[:, None].expand_as(new.since))
        shared = min(width, old.width)
        for name in ("window", "kept", "since"):
            getattr(new, name)[:, :shared] = getattr(old, name)[:, :shared]
        self.current = new

    def accept_histogram(self) -> torch.Tensor:
        """int32 ``[B, n + 1]`` over all widths."""
        total = torch.zeros_like(self.full.accept_histogram)
        for width, state in self._states.items():
            total[:, : width + 1] += state.accept_histogram
        return total


class _Kept:
    """Scores or logits of the committed tokens, for each row."""

    def __init__(self, state: JacobiState):
        self.state = state
        self.rows: list[list[torch.Tensor]] = [[] for _ in range(state.rows)]

    def add(self, values: torch.Tensor, before: list[int]) -> None:
        """values ``[B, n, V]`` of a step; before: ``produced`` before it."""
        for row, (old, new) in enumerate(zip(before, self.state.produced.tolist(), strict=True)):
            if new > old:
                self.rows[row].extend(values[row, : new - old].to(torch.float32, copy=True).unbind())

    def columns(self) -> tuple[torch.Tensor, ...]:
        """One ``[B, V]`` for each token of the longest row; what was not committed in the end is left out."""
        produced = self.state.produced.tolist()
        blank = torch.zeros_like(next(row[0] for row in self.rows if row))
        return tuple(
            torch.stack([row[t] if t < count else blank for row, count in zip(self.rows, produced, strict=True)])
            for t in range(max(produced))
        )


def _row_statistics(state: JacobiState, accept_histogram: torch.Tensor) -> tuple[RowStatistics, ...]:
    columns = (
        state.produced,
        state.iterations,
        accept_histogram,
        state.stationary,
        state.paper_iterations,
        state.paper_stationary,
        state.done,
    )
    return tuple(
        RowStatistics(
            tokens=tokens,
            iterations=iterations,
            accept_histogram=tuple(histogram),
            fast_forwarded=tokens - iterations,
            stationary=stationary,
            paper_fast_forwarded=tokens - paper_iterations,
            paper_stationary=paper_stationary,
            stopped_by=_STOP_REASONS[done],
        )
        for tokens, iterations, histogram, stationary, paper_iterations, paper_stationary, done in zip(
            *(column.tolist() for column in columns), strict=True
        )
    )


def _trajectory(
    records: list[tuple[list[int], torch.Tensor, torch.Tensor]], rows: int
) -> list[list[tuple[int, list[int]]]]:
    """The states that each row of the batch went through; ``records`` hold running rows, committed tokens, drafts."""
    trajectory: list[list[tuple[int, list[int]]]] = [[] for _ in range(rows)]
    for alive, produced, drafts in records:
        for row, start, tokens in zip(alive, produced.tolist(), drafts.tolist(), strict=True):
            trajectory[row].append((start, tokens))
    return trajectory
