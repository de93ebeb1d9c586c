"""A window through decoder layers in one call, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import backends
from ._library import DTYPE_CODES
from .window_linear import DTYPES, fits, layer_arguments
from .window_mlp import mlp_weights_fit
from .window_qkv import qkv_inputs_fit, qkv_weights_fit


class DecoderLayer(NamedTuple):
    """What `window_qkv`, `block_attention` and `window_mlp` take of one layer, by the names that they give it."""

    norm: torch.Tensor
    eps: float
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_bias: torch.Tensor | None
    key_bias: torch.Tensor | None
    value_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    head_eps: float
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    mlp_eps: float
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    scale: float
    sliding_window: int


class DecoderLayers:
    """Decoder layers and their caches, checked and held for the windows of a decode, on the CPU.

    A call does what `window_qkv`, `append_kv_`, `block_attention` and `window_mlp` do for one layer after the other with
    the backend "cpp", and gives the same bits for as many rows (see `window_linear`). Four calls in each layer cost more in
    Python than the kernels of a small model.

    layers: weights of one dtype (float32, bfloat16), as the ops take them, vectors contiguous; caches: keys and values
    [B, Hkv, S, D] of each layer, as `append_kv_` takes them, S and D the same in all; dim: D. They are held, so that what
    replaces a weight later is not seen.

    Raises ValueError on layers that do not fit, and RuntimeError without the compiled module.
    """

    def __init__(self, layers: Sequence[DecoderLayer], caches: Sequence[tuple[torch.Tensor, torch.Tensor]], dim: int):
        if not layers or len(layers) != len(caches) or dim < 2 or dim % 2:
            raise ValueError(f"there are {len(layers)} layers, {len(caches)} caches and D = {dim}; D must be even")
        if backends.EXTENSION is None:
            raise RuntimeError(backends.available()["cpp"])
        self.dim, self.dtype = dim, layers[0].norm.dtype
        self.hidden = layers[0].norm.numel()
        self.rows, _, self.capacity, _ = caches[0][0].shape
        fields = []
        for number, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
            if not self._fit(layer, cache):
                raise ValueError(f"layer {number} has weights or caches of shapes, dtypes, devices or strides that do not fit")
            fields.append(_fields(layer, cache))
        # aliases, since the storage of a parameter can be replaced
        tensors = (tensor for parts in (*layers, *caches) for tensor in parts if isinstance(tensor, torch.Tensor))
        self._held = [tensor.detach() for tensor in tensors]
        self._layers = backends.EXTENSION.DecoderLayers(fields)

    def _fit(self, layer: DecoderLayer, cache: tuple[torch.Tensor, torch.Tensor]) -> bool:
        if any(weight.dim() != 2 for weight in (layer.query, layer.key, layer.value, layer.gate)):
            return False
        queries, keys = layer.query.shape[0], layer.key.shape[0]
        shape = self.rows, keys // self.dim, self.capacity, self.dim
        vectors = (
            layer.norm, layer.mlp_norm, layer.query_norm, layer.key_norm,
            layer.query_bias, layer.key_bias, layer.value_bias, layer.output_bias,
        )  # fmt: skip
        return (
            self.dtype in DTYPES
            and qkv_weights_fit(
                self.hidden, self.dim, self.dtype, layer.norm, layer.query, layer.key, layer.value, layer.query_bias,
                layer.key_bias, layer.value_bias, layer.query_norm, layer.key_norm,
            )  # fmt: skip
            and mlp_weights_fit(
                self.hidden, queries, self.dtype, layer.output, layer.mlp_norm, layer.gate, layer.up, layer.down,
                layer.output_bias,
            )  # fmt: skip
            and keys >= 1
            and queries % keys == 0
            and layer.sliding_window >= 0
            and all(fits(tensor, shape, self.dtype) and tensor.stride(3) == 1 for tensor in cache)
            and all(vector is None or vector.is_contiguous() for vector in vectors)
        )

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        lengths: torch.Tensor,
        starts: torch.Tensor,
        branch: int = 0,
        keep: int | None = None,
        counts: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The last layer's output [B, keep, H] at the last `keep` positions of each row, None meaning all n.

        x [B, n, H], cos and sin [B, n, D], lengths and starts int32 [B] and branch as the ops take them; B at most that of
        the caches. With counts, which tells how many tokens each of B rows has, at least keep, x [1, T, H], cos and sin
        [1, T, D] have the tokens of one row after the other, and row b stands in its caches behind lengths[b]; there are no
        branches then.

        For inference: gradients are not defined. Raises ValueError, with nothing done, on what does not fit.
        """
        if not qkv_inputs_fit(x, cos, sin) or (x.shape[2], cos.shape[2], x.dtype) != (self.hidden, self.dim, self.dtype):
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)} on {x.device}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)}; they must "
                f"be {self.dtype}, [B, n, {self.hidden}] and [B, n, {self.dim}] on the CPU"
            )
        rows, width, _ = x.shape
        given = [width] * rows if counts is None else list(counts)
        batch, least = len(given), min(given, default=0)
        keep = width if keep is None else keep
        if counts is not None and (rows != 1 or sum(given) != width or branch):
            raise ValueError(
                f"counts is {given} and branch {branch}; with counts, x must be [1, {sum(given)}, H], without branches"
            )
        if not 1 <= keep <= least:
            raise ValueError(f"keep is {keep}; it must be from 1 to {least}, the fewest tokens of a row")
        if batch > self.rows or max(given) > self.capacity:
            raise ValueError(
                f"x has B = {batch} and n = {max(given)}; the caches have room for {self.rows} and {self.capacity}"
            )
        if not (fits(lengths, (batch,), torch.int32) and fits(starts, (batch,), torch.int32)):
            raise ValueError(f"lengths and starts must be int32 with shape ({batch},), on the CPU")
        if branch < 0 or width % (branch or width) or branch and keep < width:
            raise ValueError(f"branch is {branch}; it must be 0 (none) or divide the n = {width} queries of a window, all kept")
        x = x.clone(memory_format=torch.contiguous_format)
        out = x.new_empty(batch, keep, self.hidden)
        cos, sin, lengths, starts = cos.contiguous(), sin.contiguous(), lengths.contiguous(), starts.contiguous()
        self._layers.run(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), lengths.data_ptr(), starts.data_ptr(), given, out.data_ptr(), keep,
            self.hidden, self.capacity, self.dim, branch, DTYPE_CODES[self.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return out


def _fields(layer: DecoderLayer, cache: tuple[torch.Tensor, torch.Tensor]) -> tuple:
    """A layer as the extension takes it."""
    query_norm, key_norm = (0 if norm is None else norm.data_ptr() for norm in (layer.query_norm, layer.key_norm))
    return (
        layer.norm.data_ptr(), layer.eps, layer_arguments(layer.query, layer.query_bias),
        layer_arguments(layer.key, layer.key_bias), layer_arguments(layer.value, layer.value_bias), query_norm, key_norm,
        layer.head_eps, layer_arguments(layer.output, layer.output_bias), layer.mlp_norm.data_ptr(), layer.mlp_eps,
        layer_arguments(layer.gate, None), layer_arguments(layer.up, None), layer_arguments(layer.down, None),
        *((tensor.data_ptr(), *tensor.stride()[:3]) for tensor in cache), layer.scale, layer.sliding_window,
    )  # fmt: skip
