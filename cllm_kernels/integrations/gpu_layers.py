"""Decoder layers on a GPU: torch's matrix products, and a launch of this package for all that stands between two of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from ..decoding import CACHE_NAME, JacobiCache
from ..decoding.session import beside
from ..ops import add_rms_norm, block_attention, rms_norm, silu_mul
from .attention import from_mask, has_hooks


class GpuLayer:
    """What the forward of a decoder layer of Llama, Mistral, Qwen2 or Qwen3 computes, in parts that can be joined.

    Weights are read anew in each call, lest one that was replaced stay in use.
    """

    def __init__(self, layer: nn.Module, sliding_window: Callable[[nn.Module], int | None], backend: str):
        attention, mlp = layer.self_attn, layer.mlp
        self.attention, self.sliding_window = attention, sliding_window
        self.first, self.second = layer.input_layernorm, layer.post_attention_layernorm
        self.head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.output, self.gate, self.up, self.down = attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.backend = backend
        # the norms and the activation have no CUDA C++
        self.between = "auto" if backend == "cuda" else backend

    def __call__(self, hidden: torch.Tensor, mask, angles, cache, keep: None) -> torch.Tensor:
        """The layer's output ``[B, n, H]``; what may be left out on the CPU is not on a GPU."""
        hidden, delta = self.summands(hidden, None, mask, angles, cache)
        return hidden + delta

    def summands(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        mask: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: JacobiCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output as two summands ``[B, n, H]``, from its input as two; delta None stands for zeros."""
        hidden, normed = add_norm(hidden, delta, self.first, self.between)
        attention = self.attention
        q, k, v = (x.unflatten(2, (-1, attention.head_dim)) for x in _linears(self.qkv, normed))
        if self.head_norms[0] is not None:
            q, k = (_norm(x, norm, self.between) for x, norm in zip((q, k), self.head_norms, strict=True))
        angles = [x.expand(hidden.shape[0], -1, -1) for x in angles]
        keys, values = cache.append(k.transpose(1, 2), v.transpose(1, 2), attention.layer_idx, *angles, q)
        lengths, starts, branch = from_mask(mask)
        attended, _ = block_attention(
            q, keys, values, lengths, starts, attention.scaling, self.sliding_window(attention) or 0, 0.0, None, branch,
            self.backend,
        )  # fmt: skip
        hidden, normed = add_norm(hidden, _linear(self.output, attended.flatten(2)), self.second, self.between)
        inner = silu_mul(*_linears((self.gate, self.up), normed), self.between)
        return hidden, _linear(self.down, inner)


def _linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    parameters = layer._parameters
    return F.linear(x, parameters["weight"], parameters["bias"])


def _linears(layers: Iterable[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    return beside([functools.partial(_linear, layer, x) for layer in layers], x.device)


def _norm(x: torch.Tensor, norm: nn.Module, backend: str) -> torch.Tensor:
    return rms_norm(x, norm._parameters["weight"], norm.variance_epsilon, backend)


def add_norm(
    hidden: torch.Tensor, delta: torch.Tensor | None, norm: nn.Module, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and the norm of it; delta None stands for zeros."""
    if delta is None:
        return hidden, _norm(hidden, norm, backend)
    return add_rms_norm(hidden, delta, norm._parameters["weight"], norm.variance_epsilon, backend)


def is_known(norm: nn.Module, other: nn.Module, x: torch.Tensor) -> bool:
    """Whether the ops compute what a norm does with x: it is of the class of a layer's, as that has it."""
    return (
        type(norm) is type(other)
        and "forward" not in norm.__dict__
        and not has_hooks(norm)
        and norm.weight.dtype == x.dtype
        and norm.weight.device == x.device
    )


def run_layers(model: nn.Module, input_ids: torch.Tensor, cache: JacobiCache, **options) -> torch.Tensor:
    """All layers of a decoder, each swapped, and its norm; each addition in one launch with the norm behind it.

    options: keyword arguments of every layer, for the case that one has hooks.
    """
    hidden = model.embed_tokens(input_ids)
    angles = model.rotary_emb(hidden, position_ids=options["position_ids"])
    layers = list(model.layers)[: model.config.num_hidden_layers]
    if any(has_hooks(layer) or not layer.forward.takes(hidden, cache) for layer in layers):
        for layer in layers:
            hidden = layer(hidden, position_embeddings=angles, **{CACHE_NAME: cache}, **options)
        return model.norm(hidden)
    delta = None
    for layer in layers:
        hidden, delta = layer.forward.run.summands(hidden, delta, options["attention_mask"], angles, cache)
    norm = model.norm
    if not is_known(norm, layers[0].input_layernorm, hidden):
        return norm(hidden + delta)
    return add_norm(hidden, delta, norm, layers[0].forward.run.between)[1]
