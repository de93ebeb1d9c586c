"""One step of Jacobi decoding after the forward: accept, commit, stop, shift and refill."""

from __future__ import annotations

import torch

from .. import backends
from ._library import DTYPE_CODES, check_device, check_float, check_last_dim, check_rank, check_shape, register
from ._tickets import tickets
from .philox import gumbel, noise_words
from .state import REFILLS, JacobiState, check_refill, check_state, context_drafts
from .state_fields import FIELDS, READ_ONLY

MODES = ("window", "block")
# Of temperatures and their inverses: far from the ends of float32.
_LARGEST = 1e30


def converge_(
    logits: torch.Tensor,
    state: JacobiState,
    mode: str = "window",
    refill: str = "context",
    temperature: float = 0.0,
    backend: str = "auto",
) -> None:
    """Turns the logits of a forward over `state.window` into committed tokens and the next window.

    logits [B, n, V], float32, bfloat16 or float16, contiguous in the last dimension, on the state's device.
    `state` is mutated: every field but those in `state_fields.READ_ONLY`.

    For each row with done == 0, where w is its window and g[i] the prediction at i, which is argmax(logits[i]), the
    lowest index on ties, or with temperature > 0 a sample (below):

    1. accept length a = 1 + the number of leading i with w[i + 1] == g[i]; in mode "block" at most
       block_left; at most limits - produced.
    2. if one of g[0..a) is an EOS token, a ends with the first such and done = 1; else if the limit is
       reached, done = 2.
    3. commit: g[0..a) goes to output[produced..); produced and lengths grow by a, iterations by 1,
       accept_histogram[a] by 1, and stationary by the number of i in [1, a) with kept[i] == 1. With k the
       new value of iterations, g[i] was first predicted in forward c[i] = since[i + 1] where w[i + 1] has
       the same value, else k; the correct prefix of the predictions reached it in forward
       m[i] = max(front, c[0..i]). paper_stationary grows by the number of i with c[i] < m[i],
       paper_iterations by that of the different m[i] > front, and front becomes m[a - 1].
    4. unless the row is done now, the next window: w'[0] = g[a - 1] and w'[j] = g[a - 1 + j] as far as g
       reaches; kept'[j] = 1 where j >= 1 and w[a + j], the draft that stood at this position behind the
       wrong draft w[a], has the same value; then since'[j] = since[a + j], else k. In mode "block", block_left shrinks by a, and starts again
       at n when it reaches 0; drafts beyond the block (all drafts when it starts again) count as missing.
    5. missing drafts are refilled, with kept' = 0 and since' = k + 1. "last" repeats g[n - 1]. "context" gives the draft for
       new token t = produced + j - 1 the value context[context_start + r % (C - context_start)], where r is
       the first word of Philox4x32-10 with key (low, high word of the row's seed) and counter
       (t, 0, 0x4A43, iterations).

    Rows that were done before the call are neither read nor written. status[0] becomes the number of rows
    with done == 0 after the call, status[1] the number of running rows with a NaN among their logits. If
    there is any of these, no other field changes; on the CPU ValueError then names the row and the position.
    -inf is an ordinary value.

    With temperature > 0, g[i] = argmax(logits[i] / temperature + G), in float32 with the division as a product. G is
    standard Gumbel noise, so that g[i] is a sample of softmax(logits[i] / temperature). It depends on the row's seed,
    on t = produced + i and on the entry v of the vocabulary, not on the window: the sampled sequence is a fixed point
    as the greedy one is, and every way to decode gives the same one. G(v) = -log(E) with u = (word + 1/2) / 2^32 and
    E = u (1 + u (1/2 + u/3)) where u < 2^-10, else -log(max(1 - u, 2^-25)). `word` is word v // 16 % 4 of Philox4x32-10
    with key (low, high word of the row's seed) and counter (v // 64 * 16 + v % 16, 0, 0x4A47, t). The words are the
    same on all backends; the floats agree to rounding.

    Raises ValueError, before anything is mutated, on an unknown mode or refill, on a temperature that is negative or
    not finite or whose inverse is not, on logits that do not fit the state, and on the CPU on a running row with produced, limits, block_left or context_start out of range.

    Sampling as an argmax with fixed noise: Wiggers & Hoogeboom, 2020, arXiv:2002.09928.
    Jacobi decoding: Santilli et al., 2023, arXiv:2305.10427; drafts from the context and the blocks that run
    to their fixed point: CLLM, Kou et al., 2024, arXiv:2403.00835, whose counts of fast-forwarded and
    stationary tokens (section 4.3) the fields paper_* hold: they look at predictions where `stationary`
    looks at drafts.
    """
    _call(logits, *state.tensors(), mode, refill, float(temperature), backend)


def _check(
    logits: torch.Tensor, tensors: tuple[torch.Tensor, ...], mode: str, refill: str, temperature: float
) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed are {', '.join(map(repr, MODES))}")
    check_refill(refill)
    if temperature != 0 and not 1 / _LARGEST < temperature < _LARGEST:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or in ({1 / _LARGEST:.0e}, {_LARGEST:.0e})")
    window = tensors[0]
    check_rank("logits", logits, "B, n, V")
    if logits.size(2) < 1:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; the vocabulary must have at least one token")
    check_shape("logits", logits, (*window.shape, logits.size(2)))
    check_float("logits", logits)
    check_last_dim("logits", logits)
    check_device("logits", logits, "the state", window)


def _check_values(state: JacobiState) -> None:
    """On the CPU, raises ValueError on a running row whose counters contradict each other."""
    width, capacity, context = state.width, state.capacity, state.context.size(1)
    for row, (done, produced, limit, left, start) in enumerate(
        zip(
            state.done.tolist(),
            state.produced.tolist(),
            state.limits.tolist(),
            state.block_left.tolist(),
            state.context_start.tolist(),
            strict=True,
        )
    ):
        if done:
            continue
        if not 0 <= produced <= limit <= capacity:
            raise ValueError(
                f"row {row} has produced = {produced} and limit = {limit}; "
                f"0 <= produced <= limit <= {capacity} must hold"
            )
        if not 1 <= left <= width:
            raise ValueError(f"row {row} has block_left = {left}; it must be in [1, {width}]")
        if not 0 <= start < context:
            raise ValueError(f"row {row} has context_start = {start}; it must be in [0, {context})")


def _check_numbers(broken: torch.Tensor) -> None:
    """Raises ValueError on the first place where `broken`, bool [B, n], holds."""
    if broken.any():
        row, position = broken.nonzero()[0].tolist()
        raise ValueError(f"logits of row {row} at window position {position} hold NaN; they must not")


def reference(
    logits: torch.Tensor, state: JacobiState, mode: str = "window", refill: str = "context", temperature: float = 0.0
) -> None:
    """The specification of `converge_`, without a host sync except on the CPU."""
    on_cpu = logits.device.type == "cpu"
    if on_cpu:
        _check_values(state)
    width = state.width
    columns = torch.arange(width, device=logits.device)

    running = state.done == 0
    broken = logits.isnan().any(-1) & running[:, None]
    state.status[0] = running.sum()
    state.status[1] = broken.any(1).sum()
    if on_cpu:
        _check_numbers(broken)
    live = running & ~broken.any()

    if temperature > 0:
        words = noise_words(state.seeds, state.produced[:, None] + columns, logits.size(2))
        logits = logits.float() * (1 / temperature) + gumbel(words)

    # 1. accept length
    window, predicted = state.window, logits.argmax(-1)
    agreed = (window[:, 1:] == predicted[:, :-1]).long()
    accept = 1 + agreed.cumprod(1).sum(1)
    if mode == "block":
        accept = torch.minimum(accept, state.block_left.long())
    accept = torch.minimum(accept, (state.limits - state.produced).long())

    # 2. end of the row
    ends = (predicted[:, :, None] == state.eos).any(-1) & (columns < accept[:, None])
    first_end = torch.where(ends, columns, width).amin(1)
    ended = first_end < width
    accept = torch.where(ended, first_end + 1, accept)
    full = state.produced + accept == state.limits
    done = torch.where(ended, 1, torch.where(full, 2, 0))

    # 3. commit
    offsets = torch.arange(state.capacity, device=logits.device) - state.produced[:, None]
    committed = (offsets >= 0) & (offsets < accept[:, None]) & live[:, None]
    tokens = predicted.gather(1, offsets.clamp(0, width - 1))
    state.output.copy_(torch.where(committed, tokens, state.output))
    gained = torch.where(live, accept, 0)
    state.produced.add_(gained)
    state.lengths.add_(gained)
    state.iterations.add_(live)
    state.accept_histogram.add_((torch.arange(width + 1, device=logits.device) == accept[:, None]) & live[:, None])
    born = torch.where(
        (window.roll(-1, 1) == predicted) & (columns < width - 1), state.since.roll(-1, 1), state.iterations[:, None]
    )
    reached = torch.maximum(born, state.front[:, None]).cummax(1).values
    before = torch.cat((state.front[:, None], reached[:, :-1]), 1)
    counted = columns < gained[:, None]
    state.paper_stationary.add_(((born < reached) & counted).sum(1))
    state.paper_iterations.add_(((reached > before) & counted).sum(1))
    front = reached.gather(1, (accept[:, None] - 1).clamp(min=0)).squeeze(1)  # limit 0: accept is 0, and not live
    state.front.copy_(torch.where(live, front, state.front))
    state.stationary.add_(((state.kept == 1) & (columns >= 1) & (columns < gained[:, None])).sum(1))
    state.done.copy_(torch.where(live, done, state.done))

    # 4. next window
    going = live & (done == 0)
    shifted = accept[:, None] - 1 + columns
    present = shifted < width
    if mode == "block":
        left = state.block_left - accept
        present &= (columns < left[:, None]) | (columns == 0)
        state.block_left.copy_(torch.where(going, torch.where(left == 0, width, left), state.block_left))
    drafts = predicted.gather(1, shifted.clamp(0, width - 1))
    stood = window.gather(1, (shifted + 1).clamp(0, width - 1))
    stayed = present & (shifted + 1 < width) & (stood == drafts)
    kept = stayed & (columns >= 1)
    since = state.since.gather(1, (shifted + 1).clamp(0, width - 1))
    since = torch.where(stayed, since, state.iterations[:, None] + (~present).to(torch.int32))

    # 5. refill
    if refill == "context":
        new_tokens = state.produced[:, None] + columns - 1
        fresh = context_drafts(
            state.context, state.context_start, state.seeds, new_tokens, state.iterations.long()
        )
    else:
        fresh = predicted[:, -1:]
    drafts = torch.where(present, drafts, fresh)
    state.window.copy_(torch.where(going[:, None], drafts, window))
    state.kept.copy_(torch.where(going[:, None], kept, state.kept))
    state.since.copy_(torch.where(going[:, None], since, state.since))
    state.status[0] = (state.done == 0).sum()


def _implementation(logits, *arguments) -> None:
    check_state(arguments[: len(FIELDS)])
    _of_state(logits, *arguments)


def _of_state(logits, *arguments) -> None:
    """The implementation on tensors of a `JacobiState`, which checked them when it was made."""
    tensors, (mode, refill, temperature, backend) = arguments[: len(FIELDS)], _options(arguments)
    _check(logits, tensors, mode, refill, temperature)
    backend = backends.resolve(backend, logits.device, _cuda_refusal(logits.size(1)))
    if backend == "torch":
        reference(logits, JacobiState(*tensors), mode, refill, temperature)
        return
    output, context, eos = (tensors[_INDEX[name]] for name in ("output", "context", "eos"))
    arguments = (
        logits.data_ptr(), logits.stride(0), logits.stride(1), DTYPE_CODES[logits.dtype],
        [tensor.data_ptr() for tensor in tensors],
        *logits.shape, output.size(1), context.size(1), eos.size(0),
        MODES.index(mode), REFILLS.index(refill), temperature and 1 / temperature,
    )  # fmt: skip
    if backend == "cpp":
        backends.EXTENSION.converge(*arguments, torch.get_num_threads())
        return
    # Kernels for GPUs tell of NaN by the status alone; under an interpreter or emulation they run on the CPU.
    state, on_cpu = JacobiState(*tensors), logits.device.type == "cpu"
    if on_cpu:
        _check_values(state)
    running = (state.done == 0)[:, None] if on_cpu else None
    if backend == "triton":
        from ..triton.converge import converge_ as run

        named = dict(zip(_INDEX, tensors, strict=True))
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            run(logits, named, (output.size(1), context.size(1), eos.size(0)), mode, refill, temperature)
    elif logits.size(0) == 0:
        state.status.zero_()
    else:
        keys = torch.empty(backends.CUDA.converge_keys(*logits.shape), dtype=torch.int64, device=logits.device)
        stream = backends.cuda_stream(logits.device)
        backends.CUDA.converge(*arguments, keys.data_ptr(), tickets(logits.device, 1), *stream)
    if on_cpu and state.status[1]:
        _check_numbers(logits.isnan().any(-1) & running)


def _cuda_refusal(width: int) -> str | None:
    """Why backend "cuda" cannot take a window of this width, or None."""
    if backends.CUDA is None or width <= backends.CUDA.LARGEST_WINDOW:
        return None
    return f"the window has n = {width}; converge_ takes up to {backends.CUDA.LARGEST_WINDOW} there"


def _fake(logits, *arguments) -> None:
    mode, refill, temperature, _ = _options(arguments)
    check_state(arguments[: len(FIELDS)])
    _check(logits, arguments[: len(FIELDS)], mode, refill, temperature)


def _options(arguments: tuple) -> tuple[str, str, float, str]:
    """mode, refill, temperature and backend; the dispatcher leaves out trailing arguments that equal their default."""
    given = arguments[len(FIELDS) :]
    return given + ("window", "context", 0.0, "auto")[len(given) :]


_INDEX = {name: index for index, (name, *_) in enumerate(FIELDS)}


def _schema() -> str:
    written = [name for name, *_ in FIELDS if name not in READ_ONLY]
    alias = {name: f"({chr(ord('a') + index)}!)" for index, name in enumerate(written)}
    tensors = ", ".join(f"Tensor{alias.get(name, '')} {name}" for name, *_ in FIELDS)
    # "decode_mode", because torch's functionalisation takes no op with an argument named "mode".
    options = 'str decode_mode="window", str refill="context", float temperature=0.0, str backend="auto"'
    return f"converge_(Tensor logits, {tensors}, {options}) -> ()"


_call = register(_schema(), _implementation, _fake, _of_state)
