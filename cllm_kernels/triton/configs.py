"""Launch configurations: one static table, so that nothing is tuned while a model runs.

A configuration depends on the head sizes, the storage type, how many rows (token x head) share a cache head, and
the architecture, never on the batch or on the contents of a row; so a row's result does not depend on the rows
beside it.
"""

from __future__ import annotations

import dataclasses

import torch

MAX_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How `block_attention` is cut up.

    Attributes:
        block_rows: rows of a tile.
        block_keys: keys that one step of the loop takes.
        warps, stages: as Triton understands them.
    """

    block_rows: int
    block_keys: int
    warps: int
    stages: int


# Shared memory that one block can have, in bytes (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ARCHITECTURES = tuple(SHARED_MEMORY)

# By (padded head size, bytes of an element, rows of a tile): keys of a step, warps, stages. The keys and values of
# all stages and the queries stand in shared memory. One table for all architectures: an H100 ran it, nothing was
# tuned on it.
_ATTENTION = {
    (32, 2, 16): (64, 4, 3), (32, 2, 32): (128, 4, 3), (32, 2, 64): (128, 4, 3), (32, 2, 128): (32, 8, 3),
    (64, 2, 16): (128, 4, 3), (64, 2, 32): (128, 4, 3), (64, 2, 64): (64, 4, 3), (64, 2, 128): (32, 8, 3),
    (128, 2, 16): (64, 4, 3), (128, 2, 32): (64, 4, 3), (128, 2, 64): (64, 4, 3), (128, 2, 128): (64, 8, 2),
    (256, 2, 16): (32, 4, 3), (256, 2, 32): (32, 8, 3), (256, 2, 64): (32, 8, 2),
    (32, 4, 16): (64, 4, 3), (32, 4, 32): (64, 4, 2),
    (64, 4, 16): (32, 4, 2), (64, 4, 32): (32, 4, 2),
    (128, 4, 16): (32, 8, 2), (128, 4, 32): (32, 8, 2),
    (256, 4, 16): (16, 8, 1), (256, 4, 32): (16, 8, 2),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LmHeadConfig:
    """How `lm_head_argmax` is cut up.

    Attributes:
        block_tokens: tokens of a tile.
        block_vocabulary: rows of the weight of a tile.
        block_depth: hidden dims that one step of the loop takes.
        warps, stages: as Triton understands them.
    """

    block_tokens: int
    block_vocabulary: int
    block_depth: int
    warps: int
    stages: int


# By (bytes of an element, tokens of a tile): rows of the weight, hidden dims of a step, warps, stages. Two blocks of
# one multiprocessor keep about 100 KiB of weights on their way. None has been measured yet.
_LM_HEAD = {
    (2, 16): (128, 64, 4, 4), (2, 32): (128, 64, 4, 4), (2, 64): (128, 64, 4, 3), (2, 128): (128, 64, 8, 3),
    (4, 16): (64, 32, 4, 3), (4, 32): (64, 32, 4, 3), (4, 64): (64, 32, 8, 3),
}  # fmt: skip


def lm_head_config(dtype: torch.dtype, tokens: int) -> LmHeadConfig:
    """The configuration for `tokens` = B x n."""
    largest = max(size for itemsize, size in _LM_HEAD if itemsize == dtype.itemsize)
    block = min(largest, padded_dim(tokens))
    return LmHeadConfig(block, *_LM_HEAD[dtype.itemsize, block])


def lm_head_configs() -> list[tuple[int, LmHeadConfig]]:
    """Every entry of the table: bytes of an element, configuration."""
    return [(size, LmHeadConfig(tokens, *rest)) for (size, tokens), rest in _LM_HEAD.items()]


def next_power(size: int) -> int:
    """The smallest power of two that is at least `size`; Triton's blocks have such sizes."""
    return 1 << (size - 1).bit_length()


def padded_dim(size: int) -> int:
    """What `size` rows or values of a head take in a matrix product: a power of two, 16 at least."""
    return max(16, next_power(size))


def attention_config(dim: int, value_dim: int, dtype: torch.dtype, rows: int) -> AttentionConfig:
    """The configuration for heads of `dim` and `value_dim` and `rows` = n x (Hq / Hkv) rows."""
    dim = max(32, padded_dim(max(dim, value_dim)))
    largest = max(rows for *key, rows in _ATTENTION if key == [dim, dtype.itemsize])
    block_rows = min(largest, padded_dim(rows))
    block_keys, warps, stages = _ATTENTION[dim, dtype.itemsize, block_rows]
    return AttentionConfig(block_rows, block_keys, warps, stages)


def attention_configs() -> list[tuple[int, int, AttentionConfig]]:
    """Every entry of the table: padded head size, bytes of an element, configuration."""
    return [(dim, size, AttentionConfig(rows, *rest)) for (dim, size, rows), rest in _ATTENTION.items()]


def masked_keys(config: AttentionConfig) -> int:
    """Keys of a step that looks at the mask: few, since the window is short and the mask takes registers."""
    return min(32, config.block_keys)


# Splits of one row's keys at most, and keys of a split at least. The partial results of 64 rows of 128 values take
# as many bytes as 128 keys and values in bf16: with fewer keys to a split, more would be written than read.
MAX_SPLITS = 64
MIN_SPLIT_KEYS = 256
# Windows wider than this (prompts) have enough rows to occupy the device.
SPLIT_WIDTH = 128

# Logits that one program of the argmax takes, and of these at a time.
ARGMAX_SPLIT = 8192
ARGMAX_BLOCK = 2048
ARGMAX_WARPS = 8


def splits(capacity: int, width: int, rows: int) -> int:
    """Into how many parts a cache of `capacity` rows is cut at most; static, the lengths being on the device.

    A power of two, so that caches of many sizes share a compiled kernel.
    """
    if width > SPLIT_WIDTH:
        return 1
    return min(MAX_SPLITS, next_power(-(-capacity // split_keys(rows))))


def split_keys(rows: int) -> int:
    """The fewest keys of a split for `rows` rows of a tile."""
    return MIN_SPLIT_KEYS * max(1, rows // 64)


def merge_rows(splits: int, value_dim: int, rows: int) -> int:
    """Rows that one program merges: as many as 128 threads can hold (`value_dim` being padded)."""
    return min(next_power(rows), max(1, 8192 // (splits * value_dim)))


def converge_rows(width: int, rows: int) -> int:
    """Rows that the block of `converge_` takes at a time, `width` being padded to a power of two."""
    return min(next_power(rows), max(1, 256 // width))


def norm_warps(pad: int) -> int:
    """Warps that share a row of `pad` elements, 16 or fewer for each thread up to rows of 8,192.

    On an H100, 16 rows of 4,096 with the addition take 2 µs.
    """
    return max(1, min(16, pad // 512))
