"""The Jacobi loop: forward over the window, then ``converge_``, until every row is done."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from ..ops import JacobiState, converge_
from .config import JacobiConfig
from .statistics import JacobiStatistics, RowStatistics

_STOP_REASONS = {1: "eos", 2: "length"}

Forward = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""``forward(input_ids [B, m], position_ids [B, m], keep) -> logits of the last positions [B, keep, V]``."""


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What :func:`decode` returns.

    Attributes:
        tokens: a list of committed token ids for each row, EOS included.
        trajectory: for each row the windows it went through, ``[start, drafts]`` with ``start`` committed
            tokens and the n - 1 drafts that stood behind them; None unless the configuration asks for it.
    """

    tokens: list[list[int]]
    statistics: JacobiStatistics
    trajectory: list[list[tuple[int, list[int]]]] | None


def decode(
    forward: Forward,
    state: JacobiState,
    prompt: torch.Tensor,
    bounds: torch.Tensor,
    config: JacobiConfig,
    backend: str,
    max_position: int | None = None,
    on_commit: Callable[[list[int]], None] | None = None,
) -> Decoded:
    """Decodes all rows of ``state`` to their end.

    The first forward holds the prompt and the first window together, so that even the prefill commits more
    than one token where the drafts are right. On the CPU, the host reads one integer per iteration: how many
    rows still run.

    Args:
        forward: the model. It writes its keys and values at the cache rows behind ``bounds[0]``.
        state: made by ``JacobiState.create`` for this prompt, with drafts drawn and no token committed.
        prompt: int64 ``[B, P]``, left padded.
        bounds: int32 ``[2, B]``: valid cache rows (the storage of ``state.lengths``) and padding tokens
            before each row's prompt.
        backend: of ``converge_``, resolved.
        max_position: highest position id that the model can take; drafts behind it never get committed, so
            their positions are clamped. None for no limit.
        on_commit: called with the newly committed tokens of row 0 after every iteration.

    Raises:
        ValueError: the model gave NaN logits.
    """
    n = config.block_size
    width = prompt.shape[1]
    lengths, starts = bounds.unbind()
    limit = torch.iinfo(torch.int64).max if max_position is None else max_position
    records: list[tuple[torch.Tensor, ...]] = []
    streamed = 0

    def record() -> None:
        if config.record_trajectory:
            records.append((state.produced.clone(), state.window.clone(), state.done.clone()))

    def stream() -> None:
        nonlocal streamed
        if on_commit is not None:
            produced = int(state.produced[0])
            on_commit(state.output[0, streamed:produced].tolist())
            streamed = produced

    begin = time.perf_counter()
    record()
    input_ids = torch.cat((prompt[:, :-1], state.window), dim=1)
    positions = torch.arange(width - 1 + n, device=prompt.device) - starts[:, None]
    lengths.zero_()
    logits = forward(input_ids, positions.clamp_(0, limit), n)
    lengths.fill_(width - 1)
    converge_(logits, state, mode=config.mode, refill=config.draft, backend=backend)
    stream()
    running = int(state.status[0])
    prefilled = time.perf_counter()

    forwards = 1
    offsets = torch.arange(n, device=prompt.device) - starts[:, None]
    positions = torch.empty_like(offsets)
    while running:
        record()
        torch.add(offsets, lengths[:, None], out=positions)
        logits = forward(state.window, positions.clamp_(max=limit), n)
        converge_(logits, state, mode=config.mode, refill=config.draft, backend=backend)
        forwards += 1
        stream()
        running = int(state.status[0])
    end = time.perf_counter()

    produced = state.produced.tolist()
    return Decoded(
        tokens=[row[:count] for row, count in zip(state.output.tolist(), produced, strict=True)],
        statistics=JacobiStatistics(
            rows=_row_statistics(state),
            forwards=forwards,
            block_size=n,
            mode=config.mode,
            draft=config.draft,
            backend=backend,
            prefill_seconds=prefilled - begin,
            decode_seconds=end - prefilled,
        ),
        trajectory=_trajectory(records, len(produced)) if config.record_trajectory else None,
    )


def _row_statistics(state: JacobiState) -> tuple[RowStatistics, ...]:
    columns = (
        state.produced,
        state.iterations,
        state.accept_histogram,
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


def _trajectory(records: list[tuple[torch.Tensor, ...]], rows: int) -> list[list[tuple[int, list[int]]]]:
    trajectory: list[list[tuple[int, list[int]]]] = [[] for _ in range(rows)]
    for produced, window, done in records:
        for row, (start, tokens, stopped) in enumerate(
            zip(produced.tolist(), window.tolist(), done.tolist(), strict=True)
        ):
            if not stopped:
                trajectory[row].append((start, tokens[1:]))
    return trajectory
