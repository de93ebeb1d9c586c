"""Logits processors and stopping criteria of transformers, applied to a window so that they act as under AR."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import torch
from transformers.generation import logits_process

from ..ops import JacobiState

Outside = Callable[[], contextlib.AbstractContextManager]

# By name, since releases of transformers differ in what they have. Only these very classes: a subclass may do anything.


def _classes(*names: str) -> frozenset[type]:
    return frozenset(getattr(logits_process, name) for name in names if hasattr(logits_process, name))


# What they do to a row of scores depends on that row alone.
_POINTWISE = _classes(
    "EpsilonLogitsWarper", "EtaLogitsWarper", "InfNanRemoveLogitsProcessor", "LogitNormalization", "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor", "TemperatureLogitsWarper", "TopHLogitsWarper", "TopKLogitsWarper",
    "TopPLogitsWarper", "TypicalLogitsWarper",
)  # fmt: skip
# It depends on the row and on how many tokens stand before it.
_BY_LENGTH = _classes(
    "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor",
    "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor",
)  # fmt: skip
# They remember earlier calls, so they must see each token once and in order.
_STATEFUL = _classes("SynthIDTextWatermarkLogitsProcessor")
_TEMPERATURE = _classes("TemperatureLogitsWarper")


def is_stateful(processors: Sequence) -> bool:
    """Whether a processor remembers its calls: such ones need a window of one token."""
    return any(type(processor) in _STATEFUL or getattr(processor, "stateful", False) for processor in processors)


def window_tokens(prompt: torch.Tensor, state: JacobiState) -> torch.Tensor:
    """int64 ``[B, P + T + n - 1]``: prompt, committed tokens, and behind these the drafts of the window."""
    drafts = state.window[:, 1:]
    tokens = torch.cat((prompt, state.output, torch.zeros_like(drafts)), dim=1)
    columns = prompt.shape[1] + state.produced[:, None] + torch.arange(state.width - 1, device=prompt.device)
    return tokens.scatter_(1, columns, drafts)


class Processing:
    """Processes the logits of a window so that each position gets what AR decoding gives it.

    Processors whose work depends on the scores alone, or also on the number of tokens, take the whole window at once.
    If there is any other one, all take one position after the other, each with exactly the prefix that it stands on
    (prompt, committed tokens and the drafts before it). Under greedy decoding they stop behind the first wrong draft,
    since what follows cannot be committed.

    Args:
        processors: called as ``processor(input_ids [B, L], scores [B, V])``; they must be functions of these two, but
            for those that :func:`is_stateful` names, which a window of one token serves. What they return may have any
            dtype, and fewer columns: no token is chosen among the others.
        prompt: int64 ``[B, P]``, left padded.
        sampling: whether tokens are drawn; then ``temperature`` is what ``converge_`` still has to divide by.
        keep_scores: whether the processed scores are asked for.
        outside: makes a context for calls of processors that may be anybody's.

    Attributes:
        temperature: of ``converge_``: 0 is greedy.
        calls, seconds: calls of processors, and the wall clock that they took.
    """

    def __init__(
        self,
        processors: Sequence,
        prompt: torch.Tensor,
        sampling: bool,
        keep_scores: bool = False,
        outside: Outside = contextlib.nullcontext,
    ):
        self.processors = list(processors)
        self.prompt = prompt
        self.outside = outside
        self.sampling = sampling
        self.temperature = 1.0 if sampling else 0.0
        if sampling and not keep_scores and len(self.processors) == 1 and type(self.processors[0]) in _TEMPERATURE:
            self.temperature = float(self.processors.pop().temperature)
        self.vectorised = all(type(processor) in _POINTWISE | _BY_LENGTH for processor in self.processors)
        # whether nothing is read on the host
        self.on_device = all(type(processor) in _POINTWISE for processor in self.processors)
        self.calls = 0
        self.seconds = 0.0

    def __call__(self, logits: torch.Tensor, state: JacobiState) -> torch.Tensor:
        """logits ``[B, n, V]`` of any storage type; returns float32 ones, or the same if there is nothing to do."""
        if not self.processors:
            return logits
        begin = time.perf_counter()
        # transformers processes in float32 too
        if self.vectorised:
            scores = self._at_once(logits.to(torch.float32, copy=True), state)
        else:
            with self.outside():
                scores = self._by_position(logits.float(), state)
        self.seconds += time.perf_counter() - begin
        return scores

    def _at_once(self, scores: torch.Tensor, state: JacobiState) -> torch.Tensor:
        rows, width, vocabulary = scores.shape
        scores = scores.view(rows * width, vocabulary)
        ids = self.prompt.new_zeros(1, 1)
        lengths = None
        for processor in self.processors:
            if type(processor) in _POINTWISE:
                scores = processor(ids.expand(rows * width, 1), scores)
                self.calls += 1
                continue
            if lengths is None:
                lengths = state.produced[:, None] + self.prompt.shape[1] + torch.arange(width, device=scores.device)
                lengths = lengths.flatten()
            for length in lengths.unique().tolist():
                chosen = lengths == length
                part = scores[chosen]
                scores[chosen] = processor(ids.expand(part.shape[0], length), part)
                self.calls += 1
        return scores.view(rows, width, vocabulary)

    def _by_position(self, logits: torch.Tensor, state: JacobiState) -> torch.Tensor:
        width = state.width
        # What no processor gets to see cannot be committed, so NaN in it is nobody's yet.
        scores = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        tokens = window_tokens(self.prompt, state)
        room = (state.limits - state.produced).tolist()
        start = [self.prompt.shape[1] + count for count in state.produced.tolist()]
        rows = [row for row, done in enumerate(state.done.tolist()) if not done]
        for i in range(width):
            raw = logits[:, i]
            for length in sorted({start[row] + i for row in rows}):
                # The whole batch, as generate calls them: they may know rows by their index. Rows of another length are
                # not taken, but as little processed as the others: what leaves no token to choose may raise.
                processed = raw.clone()
                for processor in self.processors:
                    processed = processor(tokens[:, :length], processed)
                    self.calls += 1
                chosen = [row for row in rows if start[row] + i == length]
                scores[chosen, i] = _float32(processed, raw)[chosen]
            if i + 1 == width:
                break
            if not self.sampling:
                right = scores[:, i].argmax(-1) == state.window[:, i + 1]
                rows = [row for row in rows if right[row]]
            rows = [row for row in rows if i + 1 < room[row]]
        return scores


def _float32(scores: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Processed scores as float32 of the shape ``[B, V]`` of the model's, with the argmax they have.

    Raises:
        ValueError: the shape is not ``[B, at most V]``.
    """
    rows, columns = like.shape
    shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else ()
    if len(shape) != 2 or shape[0] != rows or not 0 < shape[1] <= columns:
        what = shape or type(scores).__name__
        raise ValueError(f"the logits processors return {what}; it must be scores [{rows}, at most {columns}]")
    result = scores.to(like)
    if scores.dtype not in (torch.float32, torch.bfloat16, torch.float16):  # rounding makes ties
        best = scores.argmax(-1, keepdim=True)
        ties = (result == result.gather(1, best)).scatter_(1, best, False)
        result = torch.where(ties, torch.nextafter(result, result.new_tensor(-torch.inf)), result)
    if scores.shape[1] < columns:  # no token is chosen there
        result = torch.nn.functional.pad(result, (0, columns - scores.shape[1]), value=-torch.inf)
    return result


class Stopping:
    """Stopping criteria that are asked for every committed token, in order, with exactly the tokens up to it.

    Args:
        criteria: called as ``criterion(input_ids [B, L], scores)``; bool, or bool ``[B]``.
        prompt: int64 ``[B, P]``, left padded.
        outside: makes a context for their calls.
    """

    def __init__(self, criteria: Sequence, prompt: torch.Tensor, outside: Outside = contextlib.nullcontext):
        self.criteria = list(criteria)
        self.prompt = prompt
        self.outside = outside

    def stops(self, before: list[int], state: JacobiState, scores: Callable[[], tuple] | None) -> dict[int, int]:
        """Rows that end here, with their number of new tokens.

        before: ``produced`` of each row before the last step; scores: gives one ``[B, V]`` for each new token, or None.
        """
        with self.outside():
            return self._stops(before, state, None if scores is None else scores())

    def _stops(self, before: list[int], state: JacobiState, scores: tuple | None) -> dict[int, int]:
        after = state.produced.tolist()
        tokens = window_tokens(self.prompt, state)
        ended: dict[int, int] = {}
        for count in range(min(before) + 1, max(after) + 1):
            rows = [row for row in range(len(after)) if before[row] < count <= after[row] and row not in ended]
            if not rows:
                continue
            ids = tokens[:, : self.prompt.shape[1] + count]
            verdict = torch.zeros(len(after), dtype=torch.bool)
            for criterion in self.criteria:
                verdict |= torch.as_tensor(criterion(ids, None if scores is None else scores[:count]), dtype=torch.bool).cpu()
            ended.update({row: count for row in rows if verdict[row]})
        return ended
