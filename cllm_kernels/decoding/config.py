"""Options of Jacobi decoding."""

from __future__ import annotations

import dataclasses

MODES = ("window", "block")
DRAFTS = ("context", "last", "lookup", "auto", "none")


@dataclasses.dataclass(frozen=True)
class JacobiConfig:
    """Options of Jacobi decoding. None but the seed changes the tokens that come out, only how fast they come.

    Attributes:
        block_size: width n of the window: tokens per forward and the most that one forward can commit.
        mode: ``"window"`` slides the window by what was accepted and refills it, so that every forward works
            on n positions. ``"block"`` runs a block of n tokens to its fixed point before it starts the next
            one, as the paper does (Kou et al. 2024, arXiv 2403.00835, algorithm 1).
        draft: where new draft tokens come from: ``"context"`` draws tokens of the prompt at random (the
            paper), ``"last"`` repeats the last prediction of the window. ``"lookup"`` also replaces drafts by
            what followed the last tokens earlier, in the prompt, the output or a rejected prediction (see
            :class:`cllm_kernels.decoding.drafts.LookupDrafts`), which pays on repetitive texts with any model.
            ``"none"`` decodes one token at a time, whatever the block size: the autoregressive loop of this package.
            ``"auto"`` chooses among context, lookup and none while it decodes, as ``adaptive`` does.
        candidates: the most windows that one forward looks at for each row, on one cache: the window of ``draft``, and
            beside it what an n-gram lookup finds in the prompt, the output and rejected predictions (for ``"lookup"``, the
            next places and predictions). The row goes on with the one that commits most, so a window never loses its
            drafts to the lookup. A forward has one window for each that is found, at most this many times as many tokens;
            ``statistics.chosen`` says which were taken.
        blocks: K blocks of block_size tokens in flight: the window has K * block_size tokens, so that later blocks
            converge while earlier ones still do. In multi-block decoding as Hu et al. (2025, arXiv 2512.14681) have it,
            only the first block commits, and the next one joins once a share of it is done. Here what is right is
            committed at once, also beyond the first block, so that from the same drafts a forward commits at least as
            much; and ``adaptive`` finds out by their speed how many tokens should be in flight. Mode ``"window"`` only.
        adaptive: whether the width of the window, and with candidates whether to look at them, is chosen anew while
            decoding, by what was accepted and what steps cost with as many rows (see
            :class:`cllm_kernels.decoding.adaptive.AdaptiveChoice`); ``statistics.steps`` says what was chosen. Mode
            ``"window"`` only.
        seed: of sampled tokens and of random drafts, in [0, 2**32), or one for each row. With a single number, rows
            get streams of their own; a row with a number of its own gives what it gives alone. None is 0, and where
            tokens are sampled a draw from torch's global generator.
        cuda_graph: whether iterations on a CUDA device are captured as graphs. None: several as one, and each by itself
            where the host works between them (lookup, trajectories, rows that wait); not with candidates, adaptive widths,
            stopping criteria, scores or processors of prefixes.
            The graph and its buffers stay with the generator for later calls of the same shapes.
        backend: of the ops, ``"auto"`` for the fastest there is (see ``cllm doctor``).
        record_trajectory: whether to keep the window of every iteration (for training).
        optimize: whether known decoder layers, and on the CPU linear layers, run by the package's own kernels while
            decoding (see :func:`cllm_kernels.optimize`).
        max_batch_size: the most rows that are decoded at once; the cache holds so many. Others wait, and once half of the
            places are free, the next of them get these. Not with scores, stopping criteria or processors that may know rows
            by their number. None: all rows at once.

    Raises:
        ValueError: an option is out of its range.
    """

    block_size: int = 16
    mode: str = "window"
    draft: str = "context"
    candidates: int = 1
    blocks: int = 1
    adaptive: bool = False
    seed: int | tuple[int, ...] | None = None
    cuda_graph: bool | None = None
    backend: str = "auto"
    record_trajectory: bool = False
    optimize: bool = True
    max_batch_size: int | None = None

    def __post_init__(self):
        for name, least in (("block_size", 2), ("candidates", 1), ("blocks", 1), ("max_batch_size", 1)):
            value = getattr(self, name)
            if name == "max_batch_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        if self.draft not in DRAFTS:
            raise ValueError(f"draft is {self.draft!r}; it must be one of {', '.join(DRAFTS)}")
        if isinstance(self.seed, list):
            object.__setattr__(self, "seed", tuple(self.seed))
        for seed in self.seed if isinstance(self.seed, tuple) else () if self.seed is None else (self.seed,):
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
                raise ValueError(f"seed is {self.seed!r}; it must be an integer in [0, 2**32), or one for each row")
        for name in ("adaptive", "record_trajectory", "optimize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if self.cuda_graph not in (None, True, False):
            raise ValueError(f"cuda_graph is {self.cuda_graph!r}; it must be None, True or False")
        if self.draft == "none" and (self.candidates > 1 or self.blocks > 1):
            what = "candidates=1" if self.candidates > 1 else "blocks=1"
            raise ValueError(f"draft='none' decodes one token at a time; it needs {what}")
        if self.candidates > 1 and self.record_trajectory:
            raise ValueError(f"candidates={self.candidates} leaves the trajectory of one window; it needs record_trajectory=False")
        if self.blocks > 1 and self.mode != "window":
            raise ValueError(f"blocks={self.blocks} commits beyond the first block in flight; it needs mode='window'")
        if self.adapts and (self.mode != "window" or self.record_trajectory):
            what = "mode='window'" if self.mode != "window" else "record_trajectory=False"
            raise ValueError(f"adaptive={self.adaptive} with draft={self.draft!r} changes the width; it needs {what}")

    @property
    def adapts(self) -> bool:
        """Whether source, candidates and width are chosen while decoding."""
        return self.draft == "auto" or (self.adaptive and self.draft != "none")

    @property
    def sources(self) -> tuple[tuple[str, int], ...]:
        """Draft sources to choose from, with the most candidates for each row."""
        alone = [(source, 1) for source in (("context", "lookup") if self.draft == "auto" else (self.draft,))]
        if self.candidates == 1:
            return tuple(alone)
        beside = (alone[0][0], self.candidates)
        return (*alone, beside) if self.adapts else (beside,)

    @property
    def looks_up(self) -> bool:
        return any(source == "lookup" or candidates > 1 for source, candidates in self.sources)

    @property
    def width(self) -> int:
        """Tokens of a window."""
        return 1 if self.draft == "none" else self.block_size * self.blocks

    @property
    def refill(self) -> str:
        """What ``converge_`` fills the end of a window with."""
        return "context" if self.draft in ("context", "auto") else "last"
