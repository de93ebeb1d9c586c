"""From a decoder layer's input to the rotated queries, keys and values of a window."""

from __future__ import annotations

import torch

from .. import backends
from ._library import check_same, check_shape, register
from .block_attention import DTYPE_CODES
from .rms_norm import reference as rms_norm_reference
from .window_linear import (
    DTYPES, check_layer, check_rows, fits, layer_arguments, layer_fits, linear_reference, resolve_cpu,
)  # fmt: skip


def window_qkv(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_bias: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    value_bias: torch.Tensor | None = None,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    head_eps: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm, the projections to queries, keys and values, and the rotary embedding, for a window on the CPU.

    x [B, n, H]; norm [H], the weight of the RMSNorm, which adds eps to the mean of squares; query [Hq * D, H], key and
    value [Hkv * D, H] and biases, as in `window_linear`; query_norm and key_norm [D], weights of RMSNorms of each head
    with head_eps, or None; cos and sin [B, n, D], D even: a head (a, b) of two halves becomes (a cos - b sin,
    b cos + a sin), as transformers' `rotate_half` has it. All of one dtype (float32, bfloat16).

    Returns queries [B, n, Hq, D], keys and values [B, n, Hkv, D], contiguous. Each row depends on its own row of x
    alone, as in `window_linear`. In bfloat16, results are rounded after the norm, after its weight, after the
    projections and after the rotation.

    For inference: gradients are not defined. Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    return _call(
        x, norm, eps, query, key, value, cos, sin, query_bias, key_bias, value_bias, query_norm, key_norm, head_eps,
        backend,
    )  # fmt: skip


def qkv_weights_fit(
    hidden, dim, dtype, norm, query, key, value, query_bias, key_bias, value_bias, query_norm, key_norm
) -> bool:  # fmt: skip
    """Whether a layer's weights are as `window_qkv` wants them on the CPU; False leaves it open."""
    queries, keys = query.shape[0], key.shape[0]
    return (
        queries % dim == keys % dim == 0
        and fits(norm, (hidden,), dtype)
        and layer_fits(query, query_bias, (queries, hidden), dtype)
        and layer_fits(key, key_bias, (keys, hidden), dtype)
        and layer_fits(value, value_bias, (keys, hidden), dtype)
        and fits(query_norm, (dim,), dtype)
        and fits(key_norm, (dim,), dtype)
    )


def qkv_inputs_fit(x, cos, sin) -> bool:
    """The same of what is no weight."""
    shape, dtype = x.shape, x.dtype
    if len(shape) != 3 or dtype not in DTYPES or not x.is_cpu:
        return False
    batch, width, hidden = shape
    dim = cos.shape[-1]
    return (
        batch * width >= 1
        and hidden >= 1
        and dim >= 2
        and dim % 2 == 0
        and fits(cos, (batch, width, dim), dtype)
        and fits(sin, (batch, width, dim), dtype)
    )


def _check(x, norm, query, key, value, cos, sin, query_bias, key_bias, value_bias, query_norm, key_norm) -> None:
    weights = norm, query, key, value, query_bias, key_bias, value_bias, query_norm, key_norm
    if qkv_inputs_fit(x, cos, sin) and qkv_weights_fit(x.shape[2], cos.shape[2], x.dtype, *weights):
        return
    check_rows(x)
    batch, width, hidden = x.shape
    dim = cos.size(-1)
    check_shape("norm", norm, (hidden,))
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_shape(name, tensor, (batch, width, dim))
    for name, tensor in (("norm", norm), ("cos", cos), ("sin", sin)):
        check_same(name, tensor, "x", x)
    check_layer("query", query, query_bias, hidden, x)
    check_layer("key", key, key_bias, hidden, x)
    check_layer("value", value, value_bias, hidden, x)
    if dim < 2 or dim % 2 or query.size(0) % dim or key.size(0) % dim or value.size(0) != key.size(0):
        raise ValueError(
            f"query, key and value have {query.size(0)}, {key.size(0)} and {value.size(0)} outputs; they must be whole "
            f"heads of D = {dim}, as cos has it, D even, and as many for key as for value"
        )
    for name, tensor in (("query_norm", query_norm), ("key_norm", key_norm)):
        if tensor is not None:
            check_shape(name, tensor, (dim,))
            check_same(name, tensor, "x", x)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    turned = x.to(wide) * cos[:, :, None].to(wide) + torch.cat((-second, first), -1).to(wide) * sin[:, :, None].to(wide)
    return turned.to(x.dtype)


def reference(
    x, norm, eps, query, key, value, cos, sin, query_bias=None, key_bias=None, value_bias=None, query_norm=None,
    key_norm=None, head_eps=0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The specification of `window_qkv`, in the dtype of its arguments."""
    dim = cos.size(-1)
    normed = rms_norm_reference(x, norm, eps)
    q, k, v = (
        linear_reference(normed, weight, bias).unflatten(-1, (-1, dim))
        for weight, bias in ((query, query_bias), (key, key_bias), (value, value_bias))
    )
    if query_norm is not None:
        q = rms_norm_reference(q, query_norm, head_eps)
    if key_norm is not None:
        k = rms_norm_reference(k, key_norm, head_eps)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _implementation(
    x, norm, eps, query, key, value, cos, sin, query_bias=None, key_bias=None, value_bias=None, query_norm=None,
    key_norm=None, head_eps=0.0, backend="auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    _check(x, norm, query, key, value, cos, sin, query_bias, key_bias, value_bias, query_norm, key_norm)
    backend = resolve_cpu(backend, x.device)
    if backend == "torch":
        return reference(
            x, norm, eps, query, key, value, cos, sin, query_bias, key_bias, value_bias, query_norm, key_norm, head_eps
        )
    batch, width, hidden = x.shape
    dim = cos.size(-1)
    q, k, v = (x.new_empty(batch, width, weight.size(0) // dim, dim) for weight in (query, key, value))
    x, norm, cos, sin = x.contiguous(), norm.contiguous(), cos.contiguous(), sin.contiguous()
    query_norm, key_norm = (None if tensor is None else tensor.contiguous() for tensor in (query_norm, key_norm))
    biases = [None if bias is None else bias.contiguous() for bias in (query_bias, key_bias, value_bias)]
    backends.EXTENSION.qkv(
        x.data_ptr(), norm.data_ptr(), eps,
        layer_arguments(query, biases[0]), layer_arguments(key, biases[1]), layer_arguments(value, biases[2]),
        0 if query_norm is None else query_norm.data_ptr(), 0 if key_norm is None else key_norm.data_ptr(), head_eps,
        cos.data_ptr(), sin.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(),
        batch * width, hidden, dim, DTYPE_CODES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return q, k, v


def _fake(
    x, norm, eps, query, key, value, cos, sin, query_bias=None, key_bias=None, value_bias=None, query_norm=None,
    key_norm=None, head_eps=0.0, backend="auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    _check(x, norm, query, key, value, cos, sin, query_bias, key_bias, value_bias, query_norm, key_norm)
    dim = cos.size(-1)
    return tuple(x.new_empty(*x.shape[:2], weight.size(0) // dim, dim) for weight in (query, key, value))


_call = register(
    "window_qkv(Tensor x, Tensor norm, float eps, Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, "
    "Tensor? query_bias=None, Tensor? key_bias=None, Tensor? value_bias=None, Tensor? query_norm=None, "
    'Tensor? key_norm=None, float head_eps=0.0, str backend="auto") -> (Tensor, Tensor, Tensor)',
    _implementation,
    _fake,
)
