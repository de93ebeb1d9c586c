"""Certificates: whether an output is what its model gives, by rescoring it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..backends import resolve
from ..decoding import CACHE_NAME, JacobiConfig, Processing, is_stateful
from ..ops import JacobiState
from ..ops.philox import gumbel, noise_words
from .attention import block_attention_enabled
from .generate import (
    _causal_lm,
    _check_inputs,
    _check_model,
    _check_options,
    _check_tokens,
    _evaluation_mode,
    _lock,
    _row_seeds,
    _without_stop_strings,
    stop_strings_hidden,
    window_forward,
)

# Options of a run that say nothing about which tokens are right.
_IGNORED = (
    "adaptive", "blocks", "candidates", "cuda_graph", "decoding", "draft", "mode", "on_commit", "output_logits",
    "output_scores", "record_trajectory", "return_dict_in_generate", "stop_strings", "stopping_criteria", "streamer",
    "tokenizer",
)  # fmt: skip
# Positions whose noise is in memory at once, for a vocabulary of 150,000 about 5 MB each.
_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A token that is not the argmax of its prefix in the forward of the whole output.

    Attributes:
        row, position: where; position counts new tokens from 0.
        token, expected: what stands there, and the argmax.
        gap: by how much the score of ``expected`` is above that of ``token``; infinite where a processor rules the
            token out, and for a token behind the end of its row.
        rounding: how far rounding can move a gap here: twice the largest difference of a score at this position
            between the forward of the whole output and the same model run in windows and one token at a time.
        near_tie: whether the gap is within the rounding, or one of the other ways to compute gives this very token.
    """

    row: int
    position: int
    token: int
    expected: int
    gap: float
    rounding: float
    near_tie: bool

    def __str__(self) -> str:
        kind = "near-tie" if self.near_tie else "wrong"
        return (
            f"row {self.row}, new token {self.position}: {self.token}, the argmax is {self.expected} "
            f"(gap {self.gap:.3g}, rounding {self.rounding:.3g}: {kind})"
        )


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What :func:`verify` found.

    Attributes:
        tokens: new tokens of each row that were checked, EOS included.
        mismatches: by row and position.
        forwards: of the model; 1 where there was no mismatch.
    """

    tokens: tuple[int, ...]
    mismatches: tuple[Mismatch, ...]
    forwards: int

    @property
    def exact(self) -> bool:
        """Every token is the argmax (or the coupled sample) of its prefix."""
        return not self.mismatches

    @property
    def near_ties(self) -> int:
        return sum(mismatch.near_tie for mismatch in self.mismatches)

    @property
    def lossless(self) -> bool:
        """Every token is that, or a near-tie."""
        return self.near_ties == len(self.mismatches)

    def __str__(self) -> str:
        verdict = "exact" if self.exact else "lossless up to near-ties" if self.lossless else "NOT lossless"
        head = f"{verdict}: {sum(self.tokens)} tokens, {len(self.mismatches)} mismatches, {self.near_ties} near-ties"
        return "\n".join([head, *map(str, self.mismatches)])


def verify(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    output,
    attention_mask: torch.Tensor | None = None,
    *,
    seed: int | Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    block_size: int = JacobiConfig.block_size,
    backend: str = JacobiConfig.backend,
    **kwargs,
) -> Certificate:
    """Rescores an output in one forward, with the model's own attention: is every token the argmax of its prefix?

    ::

        output = model.generate(**inputs, decoding="jacobi", do_sample=True, seed=7, max_new_tokens=64)
        assert verify(model, **inputs, output=output, do_sample=True, seed=7, max_new_tokens=64).lossless

    Under ``do_sample=True`` the token must be the argmax of the processed scores plus the noise of the run's ``seed``
    (see :func:`cllm_kernels.ops.converge_`). Each token is judged by the prefix that the output gives it, so that one
    wrong token does not make the later ones wrong. Where tokens differ, the model runs over the output again, in
    windows of ``block_size`` and one token at a time, to measure how much rounding there is.

    A row ends behind its first EOS token, or after as many new tokens as ``lengths`` says, and must be padded from
    there on. Whether it should have gone on (a stopping criterion, a limit) is not checked.

    Args:
        model: a causal LM that Jacobi decoding takes.
        input_ids, attention_mask: the prompt, int64 ``[B, P]``, padded on the left.
        output: what generate returned: int64 ``[B, P + N]``, or an object that has it as ``sequences``.
        lengths: new tokens of each row; by default those of the output's statistics, if it has them.
        kwargs: those of the run, as given to generate: ``do_sample``, ``temperature``, ``max_new_tokens``,
            ``logits_processor``, ``eos_token_id``, ``generation_config`` and so on.

    Raises:
        ValueError, NotImplementedError: the output or an option is not what it must be.
    """
    causal_lm = _causal_lm(model)
    statistics = getattr(output, "statistics", None)
    if lengths is None and statistics is not None:
        lengths = [row.tokens for row in statistics.rows]
    sequences = getattr(output, "sequences", output)
    for name, value in (("input_ids", input_ids), ("output", sequences)):
        if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.dtype != torch.int64:
            tensor = isinstance(value, torch.Tensor)
            what = f"{value.dtype} of shape {tuple(value.shape)}" if tensor else type(value).__name__
            raise ValueError(f"{name} is {what}; it must be an int64 tensor [batch, length]")
    if kwargs.pop("generator", None) is not None:
        raise ValueError("the seed that a generator drew is not known; decode with seed= to verify a sampled output")
    for name in _IGNORED:
        kwargs.pop(name, None)
    given = kwargs.get("generation_config")
    if given is not None:
        kwargs["generation_config"] = _without_stop_strings(given)
    elif "max_length" not in kwargs:
        kwargs.setdefault("max_new_tokens", sequences.shape[1] - input_ids.shape[1])
    call = functools.partial(
        _rescore,
        sequences=sequences,
        seed=tuple(seed) if isinstance(seed, list) else seed,
        lengths=lengths,
        config=JacobiConfig(block_size=block_size, backend=backend),
    )
    with stop_strings_hidden(causal_lm):
        return type(causal_lm).generate(
            causal_lm, input_ids, attention_mask=attention_mask, custom_generate=call, **kwargs
        )


def _rescore(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria=None,
    generation_config: GenerationConfig | None = None,
    *,
    sequences: torch.Tensor,
    seed: int | tuple[int, ...] | None,
    lengths: Sequence[int] | None,
    config: JacobiConfig,
    **model_kwargs,
) -> Certificate:
    """:func:`verify` as a ``custom_generate`` callable, which gets the processors that the run had."""
    attention = _check_model(model)
    _check_options(model, generation_config, logits_processor or [])
    pads = _check_inputs(input_ids, model_kwargs)
    sampling = bool(generation_config.do_sample)
    if sampling and seed is None:
        raise ValueError("a sampled output is verified with the seed that it was drawn with; pass seed=")
    rows, width = input_ids.shape
    _check_sequences(model, sequences, input_ids, generation_config.max_length - width)
    seeds = _row_seeds(seed, None, sampling, rows).to(model.device)
    sequences, prompt, pads = sequences.to(model.device), input_ids.to(model.device), pads.to(model.device)
    new = sequences[:, width:]
    eos = generation_config.eos_token_id
    eos = torch.as_tensor([] if eos is None else eos, dtype=torch.int64, device=new.device).flatten()
    ends = _row_ends(new, eos, lengths)

    state = JacobiState.create(prompt, pads, ends, new.shape[1], seeds=seeds)
    state.window[:, 1:] = new[:, :-1]
    run = _Run(model, sequences, width, pads)
    judge = functools.partial(_scores, processors=list(logits_processor or []), state=state, sampling=sampling)
    with torch.inference_mode(), _lock(model), _evaluation_mode(model):
        logits = run.whole()
        if bool(logits.isnan().any()):
            raise ValueError("the model gives NaN logits for this output; they must be numbers")
        scores = judge(logits)
        expected = scores.argmax(-1)
        columns = torch.arange(new.shape[1], device=new.device)
        wrong = (expected != new) & (columns < ends[:, None])
        others = []
        if bool(wrong.any()):
            at = wrong.any(0).nonzero().flatten().tolist()
            backend = resolve(config.backend, model.device)
            for others_logits in (run.tokens(at), run.windows(at, attention, config.block_size, backend)):
                other = logits.clone()  # scores may be the logits themselves
                other[:, at] = others_logits
                others.append(judge(other)[:, at].float())
            at = {position: index for index, position in enumerate(at)}
        mismatches = [
            _mismatch(row, position, new, scores[row, position].float(), [other[row, at[position]] for other in others])
            for row, position in wrong.nonzero().tolist()
        ]
    pad = generation_config.pad_token_id
    pad = int(eos[0]) if pad is None and len(eos) else int(pad or 0)
    behind = (new != pad) & (columns >= ends[:, None])
    mismatches += [
        Mismatch(row, position, int(new[row, position]), pad, math.inf, 0.0, False)
        for row, position in behind.nonzero().tolist()
    ]
    return Certificate(
        tokens=tuple(ends.tolist()),
        mismatches=tuple(sorted(mismatches, key=lambda mismatch: (mismatch.row, mismatch.position))),
        forwards=run.forwards,
    )


def _check_sequences(model: PreTrainedModel, sequences: torch.Tensor, input_ids: torch.Tensor, room: int) -> None:
    rows, width = input_ids.shape
    if sequences.shape[0] != rows or sequences.shape[1] <= width:
        raise ValueError(
            f"the output has shape {tuple(sequences.shape)}; for this prompt it must be [{rows}, more than {width}]"
        )
    if not torch.equal(sequences[:, :width].to(input_ids.device), input_ids):
        raise ValueError("the output does not begin with the prompt; pass what generate returned, prompt included")
    if sequences.shape[1] - width > room:
        raise ValueError(f"the output has {sequences.shape[1] - width} new tokens; the options allow {room}")
    _check_tokens(model, "the output", sequences)


def _row_ends(new: torch.Tensor, eos: torch.Tensor, lengths: Sequence[int] | None) -> torch.Tensor:
    """New tokens of each row, int64 ``[B]``."""
    rows, count = new.shape
    columns = torch.arange(count, device=new.device)
    ends = torch.where(torch.isin(new, eos), columns + 1, count).amin(1)
    if lengths is None:
        return ends
    if len(lengths) != rows or not all(1 <= length <= count for length in lengths):
        raise ValueError(f"lengths is {list(lengths)}; it must have {rows} numbers in [1, {count}]")
    return torch.minimum(ends, torch.as_tensor(lengths, device=new.device))


def _scores(logits: torch.Tensor, processors: list, state: JacobiState, sampling: bool) -> torch.Tensor:
    """What the next token is the argmax of, at every position of the output: ``[B, N, V]``."""
    if is_stateful(processors):
        processors = copy.deepcopy(processors)
    # As if sampling, so that what stands behind a wrong token is processed too.
    processing = Processing(processors, state.context, sampling=True, keep_scores=not sampling)
    scores = processing(logits, state)
    if not sampling:
        return scores
    scores = scores.float() * (1 / processing.temperature)
    columns = torch.arange(state.width, device=logits.device).expand(state.rows, -1)
    for chunk, part in zip(columns.split(_CHUNK, 1), scores.split(_CHUNK, 1), strict=True):
        part += gumbel(noise_words(state.seeds, chunk, logits.shape[2]))
    return scores


def _mismatch(row: int, position: int, new: torch.Tensor, score: torch.Tensor, others: list[torch.Tensor]) -> Mismatch:
    token, expected = int(new[row, position]), int(score.argmax())
    gap = float(score[expected] - score[token])
    # Two scores make a gap, and each may be off by the difference.
    rounding = 2 * max(float((score - other)[score.isfinite() & other.isfinite()].abs().max()) for other in others)
    near_tie = gap <= rounding or any(int(other.argmax()) == token for other in others)
    return Mismatch(row, position, token, expected, gap, rounding, near_tie)


class _Run:
    """Three ways to run a model over the same output; each gives the logits that its new tokens come from.

    Attributes:
        forwards: of the model so far.
    """

    def __init__(self, model: PreTrainedModel, sequences: torch.Tensor, width: int, pads: torch.Tensor):
        self.model = model
        self.sequences = sequences
        self.width = width
        self.pads = pads
        self.forwards = 0
        self.keeps = model._supports_logits_to_keep()
        columns = torch.arange(sequences.shape[1], device=sequences.device)
        self.mask = (columns >= pads[:, None]).long()
        self.positions = (columns - pads[:, None]).clamp_(min=0)

    def _forward(self, first: int, last: int, keep: int, cache: DynamicCache | None) -> torch.Tensor:
        """Logits of the last columns of ``[first, last)``."""
        self.forwards += 1
        options = {"logits_to_keep": keep} if self.keeps else {}
        return self.model(
            input_ids=self.sequences[:, first:last],
            attention_mask=self.mask[:, :last],
            position_ids=self.positions[:, first:last],
            use_cache=cache is not None,
            **{CACHE_NAME: cache},
            **options,
        ).logits[:, -keep:]

    def whole(self) -> torch.Tensor:
        """One forward: ``[B, N, V]``."""
        columns = self.sequences.shape[1]
        return self._forward(0, columns - 1, columns - self.width, None)

    def tokens(self, at: list[int]) -> torch.Tensor:
        """One token at a time, from the first of the positions to the last: ``[B, len(at), V]``."""
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        first = self.width - 1 + at[0]
        if first:
            self._forward(0, first, 1, cache)
        logits = [self._forward(first + i, first + i + 1, 1, cache) for i in range(at[-1] - at[0] + 1)]
        return torch.cat([logits[position - at[0]] for position in at], 1)

    def windows(self, at: list[int], attention: str, size: int, backend: str) -> torch.Tensor:
        """In windows, as Jacobi decoding runs: ``[B, len(at), V]``."""
        start = self.width - 1
        count = at[-1] // size + 1
        columns = start + torch.arange(count * size, device=self.sequences.device)
        inside = columns.clamp(max=self.sequences.shape[1] - 1)  # the last window may reach beyond the output
        bounds = torch.stack((torch.zeros_like(self.pads), self.pads))
        forward, _ = window_forward(self.model, attention, bounds, start + count * size, backend)
        logits = []
        with block_attention_enabled(self.model, backend) if attention == "block" else contextlib.nullcontext():
            for window in range(count):
                chosen = inside[window * size : (window + 1) * size]
                if window == 0:
                    chosen = torch.cat((torch.arange(start, device=chosen.device), chosen))
                logits.append(forward(self.sequences[:, chosen], self.positions[:, chosen], size))
                bounds[0] = start + (window + 1) * size
                self.forwards += 1
        return torch.cat(logits, 1)[:, at]
