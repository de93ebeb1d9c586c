"""`converge_` in Triton: a launch for the argmax of each part of the vocabulary, and one for all that follows.

The second launch is one block that holds all rows, because NaN logits of any row keep every row from moving. What
passes between the two is written anew by each call: nothing has to be reset, and a CUDA graph can replay them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs

# Above the key of any number.
_NAN_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def _gumbel(word):
    """As `cllm_kernels.ops.philox.gumbel`."""
    u = (word.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    series = u * (1.0 + u * (0.5 + u * 0.3333333333333333))
    exponential = tl.where(u < 0.0009765625, series, -tl.log(tl.maximum(1.0 - u, 2.9802322387695312e-08)))  # 2^-10, 2^-25
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["width", "inverse_temperature"])
def _argmax(
    logits, done, seeds, produced, keys, row_stride, position_stride, width, vocabulary, inverse_temperature,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """The largest logit of a part of the vocabulary as an int64 key: its ordered bits, then its inverted index."""
    position, split = tl.program_id(0), tl.program_id(1)
    row = position // width
    if tl.load(done + row) != 0:
        return
    at = logits + row.to(tl.int64) * row_stride + (position % width).to(tl.int64) * position_stride
    if SAMPLE:
        # A counter's four words serve entries that stand 16 apart.
        counter = tl.arange(0, BLOCK // 4)
        offsets = counter // 16 * 64 + counter % 16
        best = tl.full([BLOCK // 4], float("-inf"), tl.float32)
        broken = tl.zeros([BLOCK // 4], tl.int32)
        seed = tl.load(seeds + row)
        zero = tl.zeros_like(counter)
        token = zero + (tl.load(produced + row) + position % width)
        where = split * SPLIT + offsets
        for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, vocabulary), BLOCK):
            word0, word1, word2, word3 = tl.philox(seed, first // 4 + counter, zero, zero + 0x4A47, token)
            for w in tl.static_range(4):
                index = first + offsets + w * 16
                value = tl.load(at + index, mask=index < vocabulary, other=float("-inf")).to(tl.float32)
                broken |= (value != value).to(tl.int32)
                word = word0 if w == 0 else word1 if w == 1 else word2 if w == 2 else word3
                value = value * inverse_temperature + _gumbel(word)
                where = tl.where(value > best, index, where)
                best = tl.maximum(best, value)
    else:
        offsets = tl.arange(0, BLOCK)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        where = tl.zeros([BLOCK], tl.int32) + split * SPLIT + offsets
        broken = tl.zeros([BLOCK], tl.int32)
        for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, vocabulary), BLOCK):
            index = first + offsets
            value = tl.load(at + index, mask=index < vocabulary, other=float("-inf")).to(tl.float32)
            broken |= (value != value).to(tl.int32)
            where = tl.where(value > best, index, where)
            best = tl.maximum(best, value)
    best = tl.where(best == 0, 0.0, best)  # -0 equals 0
    bits = best.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - where).to(tl.int64)
    # indices behind the vocabulary lose against every one in it
    key = tl.max(key, 0)
    key = tl.where(tl.max(broken, 0) > 0, _NAN_KEY, key)
    tl.store(keys + position.to(tl.int64) * tl.num_programs(1) + split, key)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _refill_word(seed, token, draw):
    """The first word of Philox4x32-10, as `cllm_kernels.ops.philox.refill_draws`."""
    zero = tl.zeros_like(token)
    word, _, _, _ = tl.philox(seed, token, zero, zero + 0x4A43, zero + draw)
    return word


@triton.jit
def _plus(at, happened, running):
    """A counter of each row and how often this happened in it."""
    return tl.load(at, mask=running, other=0) + tl.sum(happened.to(tl.int32), 1)


@triton.jit(do_not_specialize=["rows", "width", "capacity", "context_width", "eos_count", "splits"])
def _converge(
    keys, window, kept, since, output, produced, lengths, limits, block_left, done, iterations, accept_histogram,
    stationary, front, paper_iterations, paper_stationary, seeds, context, context_start, eos, status,
    rows, width, capacity, context_width, eos_count, splits,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_MODE: tl.constexpr, CONTEXT: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)[None, :]
    local = tl.arange(0, ROWS)

    # NaN logits of any running row stop all.
    running_rows, broken_rows = 0, 0
    for first in range(0, rows, ROWS):
        row = first + local
        running = (row < rows) & (tl.load(done + row, mask=row < rows, other=1) == 0)
        at = (row[:, None] * width + column).to(tl.int64)
        live = running[:, None] & (column < width)
        broken = tl.zeros([ROWS, WIDTH], tl.int32)
        for split in range(0, splits):
            broken |= (tl.load(keys + at * splits + split, mask=live, other=0) == _NAN_KEY).to(tl.int32)
        running_rows += tl.sum(running.to(tl.int32), 0)
        broken_rows += tl.sum(tl.max(broken, 1), 0)
    if broken_rows > 0:
        tl.store(status, running_rows)
        tl.store(status + 1, broken_rows)
        return

    # Warps run apart, and several may hold the same value of a row. So in what follows every read of the state comes
    # before a barrier and every write behind it.
    tl.debug_barrier()
    left_running = 0
    for first in range(0, rows, ROWS):
        row = first + local
        running = (row < rows) & (tl.load(done + row, mask=row < rows, other=1) == 0)
        at = (row[:, None] * width + column).to(tl.int64)
        live = running[:, None] & (column < width)
        best = tl.full([ROWS, WIDTH], -_NAN_KEY, tl.int64)
        for split in range(0, splits):
            best = tl.maximum(best, tl.load(keys + at * splits + split, mask=live, other=0))
        predicted = 0x7FFFFFFF - (best & 0x7FFFFFFF)  # int64

        # 1. accept length: up to the first draft that differs from the prediction before it
        followed = live & (column + 1 < width)
        draft = tl.load(window + at + 1, mask=followed, other=0)
        agreed = followed & (draft == predicted)
        accept = 1 + tl.min(tl.where(agreed, WIDTH, column), 1)
        made = tl.load(produced + row, mask=running, other=0)
        limit = tl.load(limits + row, mask=running, other=0)
        block = tl.load(block_left + row, mask=running, other=1)
        if BLOCK_MODE:
            accept = tl.minimum(accept, block)
        accept = tl.minimum(accept, limit - made)

        # 2. end of the row
        ends = tl.zeros([ROWS, WIDTH], tl.int32)
        for index in range(0, eos_count):
            ends |= (predicted == tl.load(eos + index)).to(tl.int32)
        first_end = tl.min(tl.where((ends > 0) & (column < accept[:, None]), column, WIDTH), 1)
        ended = first_end < WIDTH
        accept = tl.where(ended, first_end + 1, accept)
        stop = tl.where(ended, 1, tl.where(made + accept == limit, 2, 0))

        # 3. commit
        taken = live & (column < accept[:, None])
        forward = tl.load(iterations + row, mask=running, other=0) + 1
        stood = tl.load(kept + at, mask=live, other=0)
        born = tl.where(agreed, tl.load(since + at + 1, mask=followed, other=0), forward[:, None])
        reached_before = tl.load(front + row, mask=running, other=0)
        # The running maximum of `born`, and in its low digits the first column that has it.
        ranked = tl.associative_scan(born * WIDTH + (WIDTH - 1 - column), 1, _larger)
        reached = tl.maximum(ranked // WIDTH, reached_before[:, None])
        grew = (born > reached_before[:, None]) & (WIDTH - 1 - ranked % WIDTH == column)
        new_front = tl.where(accept > 0, tl.max(tl.where(taken, reached, 0), 1), reached_before)
        histogram_at = accept_histogram + row.to(tl.int64) * (width + 1) + accept
        new_stationary = _plus(stationary + row, taken & (column >= 1) & (stood == 1), running)
        new_paper_iterations = _plus(paper_iterations + row, taken & grew, running)
        new_paper_stationary = _plus(paper_stationary + row, taken & (born < reached), running)
        new_length = tl.load(lengths + row, mask=running, other=0) + accept
        new_count = tl.load(histogram_at, mask=running, other=0) + 1

        # 4. next window: slot j takes prediction accept - 1 + j, and what stood at slot accept + j tells what stayed
        going = running & (stop == 0)
        present = tl.minimum(width - accept + 1, width)
        left = block - accept
        if BLOCK_MODE:
            present = tl.where(left == 0, 1, tl.minimum(present, left))
        source = accept[:, None] - 1 + column
        usable = live & (column < present[:, None])
        tl.debug_barrier()  # all have read the keys
        tl.store(keys + at * splits, predicted, mask=live)
        tl.debug_barrier()
        shifted = tl.load(keys + (at + accept[:, None] - 1) * splits, mask=usable & (source >= 0), other=0)
        behind = usable & (source + 1 < width)
        stayed = behind & (tl.load(window + at + accept[:, None], mask=behind, other=0) == shifted)
        stood_since = tl.load(since + at + accept[:, None], mask=behind, other=0)
        new_since = tl.where(stayed, stood_since, forward[:, None] + (1 - usable.to(tl.int32)))

        # 5. refill
        if CONTEXT:
            start = tl.load(context_start + row, mask=running, other=0)
            seed = tl.load(seeds + row, mask=running, other=0)
            token = (made + accept)[:, None] + column - 1
            word = _refill_word(seed[:, None], token, forward[:, None])
            draw = (word.to(tl.int64) & 0xFFFFFFFF) % (context_width - start)[:, None]
            fill = going[:, None] & live & (column >= present[:, None])
            fresh = tl.load(context + row[:, None].to(tl.int64) * context_width + start[:, None] + draw, mask=fill, other=0)
        else:
            last = tl.sum(tl.where(column == width - 1, predicted, 0), 1)
            fresh = tl.zeros([ROWS, WIDTH], tl.int64) + last[:, None]

        tl.debug_barrier()
        tl.store(output + row[:, None].to(tl.int64) * capacity + made[:, None] + column, predicted, mask=taken)
        tl.store(produced + row, made + accept, mask=running)
        tl.store(lengths + row, new_length, mask=running)
        tl.store(iterations + row, forward, mask=running)
        tl.store(histogram_at, new_count, mask=running)
        tl.store(stationary + row, new_stationary, mask=running)
        tl.store(front + row, new_front, mask=running)
        tl.store(paper_iterations + row, new_paper_iterations, mask=running)
        tl.store(paper_stationary + row, new_paper_stationary, mask=running)
        tl.store(done + row, stop, mask=running)
        if BLOCK_MODE:
            tl.store(block_left + row, tl.where(left == 0, width, left), mask=going)
        write = going[:, None] & live
        tl.store(window + at, tl.where(usable, shifted, fresh), mask=write)
        tl.store(kept + at, (stayed & (column >= 1)).to(tl.int32), mask=write)
        tl.store(since + at, new_since, mask=write)
        left_running += tl.sum(going.to(tl.int32), 0)
    tl.store(status, left_running)
    tl.store(status + 1, 0)


def converge_(logits, tensors, sizes, mode: str, refill: str, temperature: float) -> None:
    """The op on arguments that have been checked; see `cllm_kernels.ops.converge`.

    tensors: the state's, by name; sizes: columns of `output` and `context`, entries of `eos`.
    """
    rows, width, vocabulary = logits.shape
    if rows == 0:
        tensors["status"].zero_()
        return
    splits = triton.cdiv(vocabulary, configs.ARGMAX_SPLIT)
    keys = torch.empty(rows * width * splits, dtype=torch.int64, device=logits.device)
    _argmax[(rows * width, splits)](
        logits, *(tensors[name] for name in ("done", "seeds", "produced")), keys, logits.stride(0), logits.stride(1),
        width, vocabulary, temperature and 1 / temperature,
        SPLIT=configs.ARGMAX_SPLIT, BLOCK=configs.ARGMAX_BLOCK, SAMPLE=temperature > 0, num_warps=configs.ARGMAX_WARPS,
    )  # fmt: skip
    pad = configs.next_power(width)
    _converge[(1,)](
        keys, **tensors, rows=rows, width=width, capacity=sizes[0], context_width=sizes[1], eos_count=sizes[2],
        splits=splits, ROWS=configs.converge_rows(pad, rows), WIDTH=pad, BLOCK_MODE=mode == "block",
        CONTEXT=refill == "context", num_warps=4,
    )  # fmt: skip
