"""Options of Jacobi decoding."""

from __future__ import annotations

import dataclasses

MODES = ("window", "block")
DRAFTS = ("context", "last")


@dataclasses.dataclass(frozen=True)
class JacobiConfig:
    """Options of Jacobi decoding. No option changes the tokens that come out, only how fast they come.

    Attributes:
        block_size: width n of the window: tokens per forward and the most that one forward can commit.
        mode: ``"window"`` slides the window by what was accepted and refills it, so that every forward works
            on n positions. ``"block"`` runs a block of n tokens to its fixed point before it starts the next
            one, as the paper does (Kou et al. 2024, arXiv 2403.00835, algorithm 1).
        draft: where new draft tokens come from: ``"context"`` draws tokens of the prompt at random (the
            paper), ``"last"`` repeats the last prediction of the window.
        seed: of the draws.
        backend: of the ops, ``"auto"`` for the fastest there is (see ``cllm doctor``).
        record_trajectory: whether to keep the window of every iteration (for training).
        optimize: whether linear layers and known decoder layers run by the package's own kernels while decoding, where
            the backend is ``"cpp"`` (see :func:`cllm_kernels.optimize`).

    Raises:
        ValueError: an option is out of its range.
    """

    block_size: int = 16
    mode: str = "window"
    draft: str = "context"
    seed: int = 0
    backend: str = "auto"
    record_trajectory: bool = False
    optimize: bool = True

    def __post_init__(self):
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size!r}; it must be an integer of at least 2")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        if self.draft not in DRAFTS:
            raise ValueError(f"draft is {self.draft!r}; it must be one of {', '.join(DRAFTS)}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed!r}; it must be an integer in [0, 2**32)")
        if not isinstance(self.optimize, bool):
            raise ValueError(f"optimize is {self.optimize!r}; it must be True or False")
