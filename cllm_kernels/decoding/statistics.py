"""What a Jacobi run did, per row and in all."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RowStatistics:
    """Counts of one batch row.

    Attributes:
        tokens: committed tokens, EOS included.
        iterations: forwards while the row was running; the first one holds the prompt too.
        accept_histogram: ``[n + 1]``, iterations by their accept length.
        fast_forwarded: tokens committed beyond the one per forward that AR gives.
        stationary: committed drafts that had stood with their final value behind a wrong draft.
        paper_fast_forwarded, paper_stationary: the same two by the paper's definition (Kou et al. 2024,
            section 4.3), which looks at predictions and not at drafts, and knows the final output: a token
            is *fast-forwarded* if the correct prefix of the predictions reached it in the same forward as
            another token before it, and *stationary* if its prediction was right, and stayed so, before
            the correct prefix reached it. The verifying pass counts in neither.
        stopped_by: ``"eos"``, ``"length"`` or ``"criterion"``.
    """

    tokens: int
    iterations: int
    accept_histogram: tuple[int, ...]
    fast_forwarded: int
    stationary: int
    paper_fast_forwarded: int
    paper_stationary: int
    stopped_by: str

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.iterations


@dataclasses.dataclass(frozen=True)
class JacobiStatistics:
    """Counts and times of one call of generate.

    Attributes:
        rows: one entry a batch row.
        forwards: forwards of the model, those of prompts and first windows included.
        steps: forwards by draft source and width of the window, as ``("context x 2", 16)`` where two windows of 16 tokens
            were looked at; more than one entry only where these change.
        chosen: with candidates, how often a row went on with its own window, with the first candidate out of the lookup,
            the second and so on, over the forwards that looked at some; else empty.
        block_size: width of the window, of all blocks in flight.
        mode, draft: as decoded with.
        backend: of the ops, resolved.
        prefill_forwards: forwards of prompts, one unless rows had to wait (``max_batch_size``).
        prefill_tokens: committed by these.
        prefill_seconds: wall clock of these with their convergence checks.
        decode_seconds: wall clock of all other iterations.
        processor_calls, processor_seconds: calls of logits processors, and the wall clock that they took of the above.
        attention: ``"block"``, or ``"native"`` where the model ran with its own attention and a dense mask.
    """

    rows: tuple[RowStatistics, ...]
    forwards: int
    steps: dict[tuple[str, int], int]
    chosen: tuple[int, ...]
    block_size: int
    mode: str
    draft: str
    backend: str
    prefill_forwards: int
    prefill_tokens: int
    prefill_seconds: float
    decode_seconds: float
    processor_calls: int
    processor_seconds: float
    attention: str = "block"

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)

    @property
    def iterations(self) -> int:
        """Forwards summed over the rows, each as long as it was running."""
        return sum(row.iterations for row in self.rows)

    @property
    def tokens_per_forward(self) -> float:
        """Committed tokens per forward and running row; 1 for autoregressive decoding."""
        return self.tokens / self.iterations

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / (self.prefill_seconds + self.decode_seconds)

    @property
    def accept_histogram(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(*(row.accept_histogram for row in self.rows), strict=True)))

    @property
    def fast_forwarded(self) -> int:
        return sum(row.fast_forwarded for row in self.rows)

    @property
    def stationary(self) -> int:
        return sum(row.stationary for row in self.rows)

    @property
    def paper_fast_forwarded(self) -> int:
        return sum(row.paper_fast_forwarded for row in self.rows)

    @property
    def paper_stationary(self) -> int:
        return sum(row.paper_stationary for row in self.rows)
