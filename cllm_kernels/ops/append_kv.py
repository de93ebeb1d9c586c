"""Writes the keys and values of a window into a preallocated cache."""

from __future__ import annotations

import torch

from .. import backends
from ._library import (
    DTYPE_CODES,
    check_float,
    check_last_dim,
    check_rank,
    check_rows,
    check_same,
    check_shape,
    register,
)


def append_kv_(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    backend: str = "auto",
) -> None:
    """Writes the window's keys and values to rows [L, L + n) of each batch row's cache, in place.

    key_cache [B, Hkv, S, D] and value_cache [B, Hkv, S, Dv], mutated; key [B, Hkv, n, D] and value
    [B, Hkv, n, Dv], all of one dtype (float32, bfloat16, float16) with a contiguous last dimension and
    otherwise free strides. lengths int32 [B] holds each row's L, on the same device; it is not advanced.

    Raises ValueError, before anything is written, on shapes, dtypes, devices or strides that do not fit,
    and on the CPU when a row has L < 0 or L + n > S. On other devices rows are not checked, because that
    would make the host wait for them.
    """
    _call(key_cache, value_cache, key, value, lengths, backend)


def _check(key_cache, value_cache, key, value, lengths) -> None:
    check_rank("key_cache", key_cache, "B, Hkv, S, D")
    check_rank("value_cache", value_cache, "B, Hkv, S, Dv")
    check_rank("key", key, "B, Hkv, n, D")
    batch, heads, capacity, dim = key_cache.shape
    width = key.size(2)
    check_shape("value_cache", value_cache, (batch, heads, capacity, value_cache.size(3)))
    check_shape("key", key, (batch, heads, width, dim))
    check_shape("value", value, (batch, heads, width, value_cache.size(3)))
    check_float("key_cache", key_cache)
    check_last_dim("key_cache", key_cache)
    for name, tensor in (("value_cache", value_cache), ("key", key), ("value", value)):
        check_same(name, tensor, "key_cache", key_cache)
        check_last_dim(name, tensor)
    check_rows("lengths", lengths, batch, "key_cache", key_cache)
    if width > capacity:
        raise ValueError(f"the window has n = {width} rows; the cache has room for S = {capacity}")


def check_room(lengths: torch.Tensor, width: int, capacity: int) -> None:
    """On the CPU, raises ValueError on a row whose window does not fit; elsewhere does nothing."""
    if lengths.device.type != "cpu":
        return
    for row, length in enumerate(lengths.tolist()):
        if not 0 <= length <= capacity - width:
            raise ValueError(
                f"row {row} has length {length}: rows [L, L + n) with n = {width} must lie in a cache of S = {capacity}"
            )


def reference(key_cache, value_cache, key, value, lengths) -> None:
    batch, _, capacity, _ = key_cache.shape
    width = key.size(2)
    check_room(lengths, width, capacity)
    rows = torch.arange(batch, device=lengths.device)[:, None]
    positions = lengths[:, None] + torch.arange(width, device=lengths.device)
    key_cache[rows, :, positions] = key.transpose(1, 2)
    value_cache[rows, :, positions] = value.transpose(1, 2)


def _implementation(key_cache, value_cache, key, value, lengths, backend="auto") -> None:
    _check(key_cache, value_cache, key, value, lengths)
    backend = backends.resolve(backend, key_cache.device)
    if backend == "torch":
        reference(key_cache, value_cache, key, value, lengths)
        return
    batch, heads, capacity, dim = key_cache.shape
    lengths = lengths.contiguous()
    if backend == "triton":
        from ..triton.append_kv import append_kv_ as run

        check_room(lengths, key.size(2), capacity)
        run(key_cache, value_cache, key, value, lengths)
        return
    if backend == "cuda":
        check_room(lengths, key.size(2), capacity)
        code = DTYPE_CODES[key.dtype]
        backends.CUDA.append_kv(
            key_cache.data_ptr(), *key_cache.stride()[:3],
            value_cache.data_ptr(), *value_cache.stride()[:3],
            key.data_ptr(), *key.stride()[:3],
            value.data_ptr(), *value.stride()[:3],
            lengths.data_ptr(), batch, heads, capacity, key.size(2), dim, value.size(3),
            0, 0, 0, 0, 0, 0, 0, code, code, *backends.cuda_stream(key.device),
        )  # fmt: skip
        return
    backends.EXTENSION.append_kv(
        key_cache.data_ptr(), *key_cache.stride()[:3],
        value_cache.data_ptr(), *value_cache.stride()[:3],
        key.data_ptr(), *key.stride()[:3],
        value.data_ptr(), *value.stride()[:3],
        lengths.data_ptr(), batch, heads, capacity, key.size(2), dim, value.size(3), key.element_size(),
        torch.get_num_threads(),
    )  # fmt: skip


def _fake(key_cache, value_cache, key, value, lengths, backend="auto") -> None:
    _check(key_cache, value_cache, key, value, lengths)


_call = register(
    "append_kv_(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, Tensor lengths, "
    'str backend="auto") -> ()',
    _implementation,
    _fake,
)
