"""Certificates: whether an output is what its model gives, by rescoring it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from ..decoding import JacobiConfig, Processing, is_stateful
from ..ops import JacobiState
from ..ops.philox import gumbel, noise_words
from .attention import configs_of, submodules
from .generate import (
    _DTYPES,
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
)
from .swaps import Swaps

# Options of a run that say nothing about which tokens are right.
_IGNORED = {field.name for field in dataclasses.fields(JacobiConfig)} - {"seed"} | {
    "decoding", "on_commit", "output_logits", "output_scores", "return_dict_in_generate", "stop_strings",
    "stopping_criteria", "streamer", "tokenizer",
}  # fmt: skip
# Forwards with other roundings, where one does not explain a token of a model that jumps.
_NUDGED = 8
_CHOICES = {"topk", "sort", "argmax"}
# Operations that add up products, whose order is another one in each honest way to compute.
_PRODUCTS = {"linear", "matmul", "mm", "addmm", "mv", "addmv", "bmm", "baddbmm", "_grouped_mm", "convolution"}
# Positions whose noise is in memory at once, for a vocabulary of 150,000 about 5 MB each.
_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A token that is not the argmax of its prefix in the forward of the whole output.

    Attributes:
        row, position: where; position counts new tokens from 0.
        token, expected: what stands there, and the argmax.
        gap: by how much the best score is above that of ``token``, both computed in float64; infinite where a
            processor rules the token out, and for a token behind the end of its row.
        rounding: how far rounding moves a gap here (see :func:`verify`), in the units of the scores.
        near_tie: whether rounding so large can make ``token`` the argmax.
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
        if self.near_tie and self.gap > self.rounding:
            kind = "near-tie at a cutoff"
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
        forwards: of the model; 1 where there was no mismatch, else 2, or 10 (see :func:`verify`).
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
    **kwargs,
) -> Certificate:
    """Rescores an output in one forward, with the model's own attention: is every token the argmax of its prefix?

    ::

        output = model.generate(**inputs, decoding="jacobi", do_sample=True, seed=7, max_new_tokens=64)
        assert verify(model, **inputs, output=output, do_sample=True, seed=7, max_new_tokens=64).lossless

    Under ``do_sample=True`` the token must be the argmax of the processed scores plus the noise of the run's ``seed``
    (see :func:`cllm_kernels.ops.converge_`). Each token is judged by the prefix that the output gives it, so that one
    wrong token does not make the later ones wrong.

    Where a token differs, rounding may be the reason, or an error. So the model runs over the output once more, every
    operation in float64, to which rounding is nothing. The difference of these logits and those of the first forward is
    the rounding error of the model in its dtype at this position, and its range over the vocabulary (largest less
    smallest) is the most by which rounding has moved a gap between two tokens. Another honest way to compute, one token
    at a time or in windows, rounds otherwise but about as much, and by so little that it prefers another token only
    where the gap *in float64* is within that. Nothing in this comes from the package's own kernels, so an
    error of theirs which moves a gap by more is found, and two paths of torch that happen to round alike do no harm.
    The range, since a single gap's error may be 0 by chance, while those of a vocabulary seldom are; a shift of all
    logits, which changes no token, does not count. A difference is a near-tie if a change of the float64 logits by no
    more than this makes the token the argmax: of the token's own logit, or such that a cutoff (top-k, top-p, min-p)
    lets the token in or leaves out the argmax.

    A mixture of experts jumps where two experts tie, and one forward need not have jumped. So where its rounding does not
    explain a token, and the model takes the largest of anything, eight more forwards are looked at, in which every sum of
    products is moved at random by up to the unit roundoff, as in Monte Carlo arithmetic (Parker 1997); the largest range
    counts.

    A row ends behind its first EOS token, or after as many new tokens as ``lengths`` says, and must be padded from
    there on. Whether it should have gone on (a stopping criterion, a limit) is not checked.

    Args:
        model: a causal LM that Jacobi decoding takes.
        input_ids, attention_mask: the prompt, int64 ``[B, P]``, padded on the left.
        output: what generate returned: int64 ``[B, P + N]``, or an object that has it as ``sequences``.
        lengths: new tokens of each row; by default those of the output's statistics, if it has them.
        kwargs: those of the run, as given to generate: ``do_sample``, ``temperature``, ``max_new_tokens``,
            ``logits_processor``, ``eos_token_id``, ``generation_config`` and so on. Those that
            change no token, such as ``block_size``, are taken and ignored.

    Raises:
        ValueError, NotImplementedError: the output or an option is not what it must be. An output without new tokens
            is refused too: a certificate of nothing would pass.
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
        kwargs.setdefault("max_new_tokens", max(1, sequences.shape[1] - input_ids.shape[1]))  # none is refused below
    call = functools.partial(
        _rescore,
        sequences=sequences,
        seed=tuple(seed) if isinstance(seed, list) else seed,
        lengths=lengths,
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
    **model_kwargs,
) -> Certificate:
    """:func:`verify` as a ``custom_generate`` callable, which gets the processors that the run had."""
    _check_model(model)
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
    judge = functools.partial(_scores, processors=list(logits_processor or []), state=state, sampling=sampling)
    forwards = 1
    with _lock(model), _evaluation_mode(model):
        with torch.inference_mode():
            logits = _logits(model, sequences, width, pads)
            if bool(logits.isnan().any()):
                raise ValueError("the model gives NaN logits for this output; they must be numbers")
            expected = judge(logits).argmax(-1)
            columns = torch.arange(new.shape[1], device=new.device)
            wrong = (expected != new) & (columns < ends[:, None])
        mismatches = []
        if bool(wrong.any()):
            forwards += 1
            with _in_float64(model) as computed:
                exact = _logits(model, sequences, width, pads)
            moved = _moved(logits, exact)
            mismatches = _mismatches(new, expected, wrong, moved, exact, judge)
            if computed.chooses and not all(mismatch.near_tie for mismatch in mismatches):
                forwards += _NUDGED
                for seed_of_noise in range(_NUDGED):
                    with torch.no_grad(), _Nudged(seed_of_noise, model.device):
                        logits = _logits(model, sequences, width, pads)
                    moved = torch.maximum(moved, _moved(logits, exact))
                mismatches = _mismatches(new, expected, wrong, moved, exact, judge)
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
        forwards=forwards,
    )


def _check_sequences(model: PreTrainedModel, sequences: torch.Tensor, input_ids: torch.Tensor, room: int) -> None:
    rows, width = input_ids.shape
    if sequences.shape == input_ids.shape:
        raise ValueError(
            f"the output has no new tokens, only as many as the prompt ({width}); "
            "pass what generate returned, prompt included"
        )
    if sequences.shape[0] != rows or sequences.shape[1] < width:
        raise ValueError(
            f"the output has shape {tuple(sequences.shape)}; for this prompt it must be [{rows}, {width} + new tokens]"
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


def _moved(logits: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """By how much rounding moved a gap between two tokens, at most: ``[B, N, 1]`` of two ``[B, N, V]``."""
    error = logits.double() - exact
    finite = error.isfinite()
    return error.masked_fill(~finite, -math.inf).amax(-1, True) - error.masked_fill(~finite, math.inf).amin(-1, True)


@torch.inference_mode()
def _mismatches(
    new: torch.Tensor,
    expected: torch.Tensor,
    wrong: torch.Tensor,
    moved: torch.Tensor,
    exact: torch.Tensor,
    judge: Callable[[torch.Tensor], torch.Tensor],
) -> list[Mismatch]:
    """What differs, and whether rounding explains it: see :func:`verify`.

    new, expected: int64 ``[B, N]``; wrong: bool ``[B, N]``, where they differ and count; moved: ``[B, N, 1]`` of
    :func:`_moved`; exact: logits in float64, ``[B, N, V]``; judge: makes scores ``[B, N, V]`` of logits.
    """
    at = wrong.any(0).nonzero().flatten()
    base, new_at = exact.float(), new[:, at]
    exact, moved = exact[:, at], moved[:, at]

    def judged(values: torch.Tensor) -> torch.Tensor:
        base[:, at] = values.float()
        return judge(base)[:, at]

    def pick(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return values.gather(-1, tokens[..., None])

    def raised(tokens: torch.Tensor) -> torch.Tensor:
        return exact.scatter_add(-1, tokens[..., None], moved)

    scores = judged(exact)
    best = scores.argmax(-1)
    gaps = (pick(scores, best) - pick(scores, new_at))[..., 0]
    # In the units of scores, as a temperature or a penalty scales the logit.
    rounding = (pick(judged(raised(best)), best) - pick(scores, best))[..., 0]
    own, theirs = pick(exact, new_at), pick(exact, best)
    near_tie = torch.zeros_like(gaps, dtype=torch.bool)
    for changed in (
        # The token alone: it passes its rivals, and cutoffs that count tokens or compare with the largest.
        raised(new_at),
        # And all that stand below it, so that those above have less of the probability: for cutoffs by mass.
        torch.where(exact > own, torch.maximum(exact, own + moved), exact + moved),
        # All that may stand above the argmax, for a cutoff to leave that out.
        torch.where((exact > theirs - moved) & (exact != theirs), exact + moved, exact),
    ):
        changed = judged(changed)
        near_tie |= (pick(changed, new_at) >= changed.amax(-1, True))[..., 0]
    at = {position: index for index, position in enumerate(at.tolist())}
    return [
        Mismatch(
            row,
            position,
            token=int(new[row, position]),
            expected=int(expected[row, position]),
            gap=float(gaps[row, at[position]]),
            rounding=float(rounding[row, at[position]]),
            near_tie=bool(near_tie[row, at[position]]),
        )
        for row, position in wrong.nonzero().tolist()
    ]


def _logits(model: PreTrainedModel, sequences: torch.Tensor, width: int, pads: torch.Tensor) -> torch.Tensor:
    """What the new tokens come from, in one forward with the model's own attention: ``[B, N, V]``.

    sequences: int64 ``[B, P + N]``; width: P; pads: of each row, ``[B]``.
    """
    columns = torch.arange(sequences.shape[1] - 1, device=sequences.device)
    keep = sequences.shape[1] - width
    return model(
        input_ids=sequences[:, :-1],
        attention_mask=(columns >= pads[:, None]).long(),
        position_ids=(columns - pads[:, None]).clamp_(min=0),
        use_cache=False,
        **({"logits_to_keep": keep} if model._supports_logits_to_keep() else {}),
    ).logits[:, -keep:]


class _Float64(TorchDispatchMode):
    """Gives every operation of torch its floating-point tensors in float64, and makes it return that.

    So the model itself computes in float64, with one weight at a time in memory as that; what it says of dtypes
    (norms and softmax in float32, results in its own dtype again) becomes float64 too.

    Attributes:
        chooses: whether the model took the largest of some numbers, as those with experts do.
    """

    def __init__(self):
        super().__init__()
        self.chooses = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.chooses |= func.overloadpacket.__name__ in _CHOICES
        return func(*tree_map(self._widen, args), **tree_map(self._widen, kwargs or {}))

    @staticmethod
    def _widen(value):
        if isinstance(value, torch.Tensor):
            return value.double() if value.dtype in _DTYPES else value
        return torch.float64 if isinstance(value, torch.dtype) and value in _DTYPES else value


class _Nudged(TorchDispatchMode):
    """Moves each sum of products at random by up to the unit roundoff, and rounds it again: another way to round."""

    def __init__(self, seed: int, device: torch.device):
        super().__init__()
        self.generator = torch.Generator(device).manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            return self._nudge(result)
        if name.startswith("_scaled_dot_product"):
            return self._nudge(result[0]), *result[1:]
        return result

    def _nudge(self, sums: torch.Tensor) -> torch.Tensor:
        if not sums.is_floating_point():
            return sums
        noise = torch.rand(sums.shape, generator=self.generator, device=sums.device, dtype=torch.float32) * 2 - 1
        return (sums * (1 + torch.finfo(sums.dtype).eps / 2 * noise.double())).to(sums.dtype)


@contextlib.contextmanager
def _in_float64(model: PreTrainedModel) -> Iterator[_Float64]:
    """A model computes in float64 inside the context, without gradients, and is as it was behind it."""
    # Some rotary embeddings set theirs in a forward.
    buffers = [(module, dict(module._buffers)) for module in submodules(model)]
    # What has no float64: flash attention, and experts by grouped matrix products.
    names = {"_attn_implementation_internal": ("eager", "sdpa"), "_experts_implementation_internal": ("eager", None)}
    swaps = Swaps(
        (config, name, "eager")
        for config in configs_of(model)
        for name, fit in names.items()
        if getattr(config, name, None) not in fit
    )
    try:
        # Not inference mode, whose tensors have no version for views that experts make.
        with swaps, torch.no_grad(), _Float64() as mode:
            yield mode
    finally:
        for module, values in buffers:
            module._buffers.update(values)
