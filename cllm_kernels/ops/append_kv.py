"""Writes the keys and values of a window into a preallocated cache, and rotates its queries on the way."""

from __future__ import annotations

import torch

from .. import backends
from ._library import (
    DTYPE_CODES,
    FLOAT_DTYPES,
    check_device,
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
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    query: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Writes the window's keys and values to rows [L, L + n) of each batch row's cache, in place.

    key_cache [B, Hkv, S, D] and value_cache [B, Hkv, S, Dv], mutated; key [B, Hkv, n, D] and value
    [B, Hkv, n, Dv], all of one dtype (float32, bfloat16, float16) with a contiguous last dimension and
    otherwise free strides. lengths int32 [B] holds each row's L, on the same device; it is not advanced.

    cos and sin [B, n, R], given both or none, in the key's dtype or float32, with a contiguous last dimension:
    rotary position embedding of the keys while they are written. Values are copied, and so are the dims of a key
    from R on. With the halves k1 = k[:R / 2] and k2 = k[R / 2 : R] of a key, R being even and at most D,

        k[:R] = k[:R] * cos + concat(-k2, k1) * sin

    in the order and with the roundings of `apply_rotary_pos_emb` of transformers (Llama): both products and the
    sum are rounded to the dtype of cos, and the sum then to that of the cache. All backends give the same bits.
    RoPE: Su et al., 2021, arXiv:2104.09864.

    query [B, n, Hq, D], allowed with cos and sin: the window's queries, rotated in the same way and in place, so that one
    launch prepares `block_attention`. Also of rows whose keys do not fit.

    Raises ValueError, before anything is written, on shapes, dtypes, devices or strides that do not fit,
    and on the CPU when a row has L < 0 or L + n > S. On other devices rows are not checked, because that
    would make the host wait for them.
    """
    _call(key_cache, value_cache, key, value, lengths, cos, sin, query, backend)


def _check_angles(key, cos, sin) -> None:
    if cos is None or sin is None:
        missing, given = ("cos", "sin") if cos is None else ("sin", "cos")
        raise ValueError(f"{missing} is None although {given} is given; both must be given, or none")
    check_rank("cos", cos, "B, n, R")
    batch, _, width, dim = key.shape
    rotary = cos.size(2)
    if rotary % 2 or not 2 <= rotary <= dim:
        raise ValueError(f"cos has R = {rotary}; it must be even and from 2 to D = {dim}")
    check_shape("cos", cos, (batch, width, rotary))
    check_shape("sin", sin, (batch, width, rotary))
    if cos.dtype not in (key.dtype, torch.float32):
        raise ValueError(f"cos has dtype {cos.dtype}; it must be that of key, {key.dtype}, or torch.float32")
    check_device("cos", cos, "key_cache", key)
    check_same("sin", sin, "cos", cos)
    check_last_dim("cos", cos)
    check_last_dim("sin", sin)


def _check_query(query, key, cos) -> None:
    check_rank("query", query, "B, n, Hq, D")
    batch, _, width, dim = key.shape
    check_shape("query", query, (batch, width, query.size(2), dim))
    if cos is None:
        raise ValueError("query is given without cos and sin; it is what they rotate")
    check_same("query", query, "key_cache", key)
    check_last_dim("query", query)


def _fits(key_cache, value_cache, key, value, lengths) -> bool:
    """Whether `_check` would pass without angles, for the arguments of every layer; False leaves it open."""
    keys, values = key_cache.shape, value_cache.shape
    if not len(keys) == len(values) == len(key.shape) == 4:
        return False
    batch, heads, capacity, dim = keys
    width, dtype, device = key.shape[2], key_cache.dtype, key_cache.device
    return (
        values[:3] == keys[:3]
        and key.shape == (batch, heads, width, dim)
        and value.shape == (batch, heads, width, values[3])
        and width <= capacity
        and dtype in FLOAT_DTYPES
        and dtype == value_cache.dtype == key.dtype == value.dtype
        and key_cache.stride()[3] == value_cache.stride()[3] == key.stride()[3] == value.stride()[3] == 1
        and lengths.dtype == torch.int32
        and lengths.shape == (batch,)
        and device == value_cache.device == key.device == value.device == lengths.device
    )


def _check(key_cache, value_cache, key, value, lengths, cos, sin, query) -> None:
    if cos is None and sin is None and query is None and _fits(key_cache, value_cache, key, value, lengths):
        return
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
    if cos is not None or sin is not None:
        _check_angles(key, cos, sin)
    if query is not None:
        _check_query(query, key, cos)


def check_room(lengths: torch.Tensor, width: int, capacity: int) -> None:
    """On the CPU, raises ValueError on a row whose window does not fit; elsewhere does nothing."""
    if lengths.device.type != "cpu":
        return
    for row, length in enumerate(lengths.tolist()):
        if not 0 <= length <= capacity - width:
            raise ValueError(
                f"row {row} has length {length}: rows [L, L + n) with n = {width} must lie in a cache of S = {capacity}"
            )


def rotate(key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The keys [B, Hkv, n, D] with their first R dims rotated, by cos and sin [B, n, R]."""
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = key.tensor_split((cos.size(3),), 3)
    first, second = turned.chunk(2, 3)
    turned = turned * cos + torch.cat((-second, first), 3) * sin
    return torch.cat((turned.to(key.dtype), rest), 3)


def _rotate_query_(query, cos, sin) -> None:
    query.copy_(rotate(query.transpose(1, 2), cos, sin).transpose(1, 2))


def reference(key_cache, value_cache, key, value, lengths, cos=None, sin=None, query=None) -> None:
    batch, _, capacity, _ = key_cache.shape
    width = key.size(2)
    check_room(lengths, width, capacity)
    if cos is not None:
        key = rotate(key, cos, sin)
    if query is not None:
        _rotate_query_(query, cos, sin)
    rows = torch.arange(batch, device=lengths.device)[:, None]
    positions = lengths[:, None] + torch.arange(width, device=lengths.device)
    key_cache[rows, :, positions] = key.transpose(1, 2)
    value_cache[rows, :, positions] = value.transpose(1, 2)


def _implementation(
    key_cache, value_cache, key, value, lengths, cos=None, sin=None, query=None, backend="auto"
) -> None:
    _check(key_cache, value_cache, key, value, lengths, cos, sin, query)
    backend = backends.resolve(backend, key_cache.device)
    if backend == "torch":
        reference(key_cache, value_cache, key, value, lengths, cos, sin, query)
        return
    batch, heads, capacity, dim = key_cache.shape
    lengths = lengths.contiguous()
    if backend == "triton":
        from ..triton.append_kv import append_kv_ as run

        check_room(lengths, key.size(2), capacity)
        with torch.cuda.device_of(key_cache):  # Triton launches on the current device
            run(key_cache, value_cache, key, value, lengths, cos, sin, query)
        return
    angles = [(0, 0, 0) if tensor is None else (tensor.data_ptr(), *tensor.stride()[:2]) for tensor in (cos, sin)]
    rotary, angle_dtype = (0, key.dtype) if cos is None else (cos.size(2), cos.dtype)
    arguments = (
        key_cache.data_ptr(), *key_cache.stride()[:3],
        value_cache.data_ptr(), *value_cache.stride()[:3],
        key.data_ptr(), *key.stride()[:3],
        value.data_ptr(), *value.stride()[:3],
        *angles[0], *angles[1],
        lengths.data_ptr(), batch, heads, capacity, key.size(2), dim, value.size(3), rotary,
        DTYPE_CODES[key.dtype], DTYPE_CODES[angle_dtype],
    )  # fmt: skip
    if backend == "cuda":
        check_room(lengths, key.size(2), capacity)
        turned = (0, 0, 0, 0, 0) if query is None else (query.data_ptr(), *query.stride()[:3], query.size(2))
        backends.CUDA.append_kv(*arguments, *turned, *backends.cuda_stream(key.device))
        return
    backends.EXTENSION.append_kv(*arguments, torch.get_num_threads())
    if query is not None:
        _rotate_query_(query, cos, sin)


def _fake(key_cache, value_cache, key, value, lengths, cos=None, sin=None, query=None, backend="auto") -> None:
    _check(key_cache, value_cache, key, value, lengths, cos, sin, query)


_call = register(
    "append_kv_(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, Tensor lengths, "
    'Tensor? cos=None, Tensor? sin=None, Tensor(c!)? query=None, str backend="auto") -> ()',
    _implementation,
    _fake,
)
