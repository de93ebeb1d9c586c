"""Registers block attention with transformers, and switches a model to it while it decodes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..ops import block_attention
from ..ops.block_attention import visible_rows
from .swaps import Swaps

# What transformers passes through to attention functions unread. It takes any 4-D mask as ready made, so the
# bounds travel as a "mask" of shape [2, B, 1, 1]: no mask is ever built, and no layer needs a keyword of ours. Its last
# dimension tells of branches, being expanded to as many columns as a branch has tokens.

# Model types outside the attention interface whose own attention adds a 4-D mask as it is given, over whatever keys
# the cache returns, and takes positions from position_ids alone. Others slice a causal mask of their own by the number
# of keys (GPT-Neo), or place ALiBi by the mask's columns (BLOOM, MPT, Falcon with alibi).
_NATIVE = {"codegen", "falcon", "gptj"}
# Model types inside the attention interface that make their mask whatever they are given, or read it; others that do are
# found out in their first forward.
_OWN_MASK = {
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "doge", "marian", "mbart", "pegasus", "plbart",
}  # fmt: skip


def as_mask(bounds: torch.Tensor, branch: int = 0) -> torch.Tensor:
    """Views bounds ``[2, B]`` (cache lengths, first valid rows) in the shape that models hand through.

    branch: of :func:`block_attention`, 0 or at least 2.
    """
    return bounds[:, :, None, None].expand(-1, -1, 1, max(1, branch))


def from_mask(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Lengths, starts and branch, out of what :func:`as_mask` made."""
    lengths, starts = mask[:, :, 0, 0].unbind()
    columns = mask.shape[3]
    return lengths, starts, columns if columns > 1 else 0


def dense_mask(bounds: torch.Tensor, width: int, capacity: int, dtype: torch.dtype, branch: int = 0) -> torch.Tensor:
    """The mask of a window behind bounds ``[2, B]`` as numbers to add, ``[B, 1, width, capacity]``."""
    seen = visible_rows(*bounds, torch.arange(width, device=bounds.device), capacity, branch or width)[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=bounds.device).masked_fill_(~seen, torch.finfo(dtype).min)


def attention_kind(model: PreTrainedModel) -> str:
    """What ``model`` decodes with: ``"block"``, the ops of this package, or ``"native"``, its own attention.

    Raises:
        NotImplementedError: with neither.
    """
    if model._can_set_attn_implementation():
        if model.config.model_type in _OWN_MASK:
            raise NotImplementedError(
                f"{type(model).__name__} makes its attention mask itself; Jacobi decoding cannot run it"
            )
        return "block"
    if model.config.model_type in _NATIVE and not getattr(model.config, "alibi", False):
        return "native"
    raise NotImplementedError(
        f"{type(model).__name__} does not use the attention interface of transformers, so Jacobi decoding "
        "cannot run its attention"
    )


def _attention(
    backend: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query ``[B, Hq, n, D]``, whole cache buffers, bounds as mask."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        raise NotImplementedError(f"{type(module).__name__} builds its attention mask itself; Jacobi decoding cannot run it")
    if sliding_window is None and _slides(module):
        raise NotImplementedError(
            f"{type(module).__name__} gives its sliding window in its mask alone; Jacobi decoding cannot run it"
        )
    lengths, starts, branch = from_mask(attention_mask)
    output, _ = block_attention(
        query.transpose(1, 2).to(key.dtype),  # which autocast may differ in
        key,
        value,
        lengths,
        starts,
        scale=scaling,
        sliding_window=sliding_window or 0,
        softcap=softcap or 0.0,
        sinks=s_aux,
        branch=branch,
        backend=backend,
    )
    return output, None


def _slides(module: torch.nn.Module) -> bool:
    config = getattr(module, "config", None)
    if getattr(config, "model_type", None) == "phimoe":
        return config.sliding_window is not None
    layer_types = getattr(config, "layer_types", None)
    return layer_types is not None and layer_types[module.layer_idx] == "sliding_attention"


def _no_mask(*args, **kwargs):
    raise NotImplementedError("this model builds its attention mask itself; Jacobi decoding cannot run it")


def _register(backend: str) -> str:
    name = f"cllm_jacobi_{backend}"
    if name not in AttentionInterface().valid_keys():

        def attention(*args, **kwargs):
            return _attention(backend, *args, **kwargs)

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, _no_mask)
    return name


def submodules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """``model.modules()``, at a fraction of its time; in another order."""
    seen, waiting = set(), [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting.extend(module.__dict__["_modules"].values())


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of the module runs more than its forward: hooks of its own, or what ``compile`` made of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl is not None)


def configs_of(model: PreTrainedModel) -> list:
    """The configurations of a model and of models inside it, each once."""
    models = (module for module in submodules(model) if isinstance(module, PreTrainedModel))
    return list({id(module.config): module.config for module in models}.values())


@contextlib.contextmanager
def block_attention_enabled(model: PreTrainedModel, backend: str) -> Iterator[Swaps]:
    """Runs ``model`` with block attention of ``backend`` inside the context, and as it was after it.

    Yields what is swapped.
    """
    name = "_attn_implementation_internal"
    configs = configs_of(model)
    before = [getattr(config, name) for config in configs]
    try:
        model.set_attn_implementation(_register(backend))
        during = [getattr(config, name) for config in configs]
    finally:
        for config, implementation in zip(configs, before, strict=True):
            setattr(config, name, implementation)
    with Swaps((config, name, value) for config, value in zip(configs, during, strict=True)) as swaps:
        yield swaps
