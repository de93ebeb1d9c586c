"""Greedy predictions of a known model without its logits."""

from __future__ import annotations

import torch
from torch import nn

from ..decoding import Predictions
from ..ops import lm_head_argmax
from ..ops.window_linear import fast_rows
from .optimize import linear_reason

# Classes of transformers whose logits are `lm_head` of the last hidden state of `model`, with nothing behind it.
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
# Logits of fewer bytes are made: doing without them was measured to be no faster. More than this malloc takes anew from
# the system in every step, which then waits for its pages.
_LEAST_BYTES = 32 << 20


def plain_head(model: nn.Module, backend: str) -> nn.Linear | None:
    """The LM head of a model of which the decoder and the head are all, if the C++ kernels can take the head's place.

    None for other classes and subclasses, where the head is no plain linear layer or has hooks, and where the model has
    hooks or another forward, which would miss the logits.
    """
    name = type(model).__name__.removesuffix("ForCausalLM")
    source = f"transformers.models.{name.lower()}.modeling_{name.lower()}"
    if name not in _FAMILIES or type(model).__module__ != source or "forward" in model.__dict__:
        return None
    head = model.lm_head
    if any(module._forward_hooks or module._forward_pre_hooks for module in (model, head)):
        return None
    return head if linear_reason(head, backend) is None else None


def predict(head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor | Predictions:
    """Predictions from hidden states ``[B, n, H]``; or their logits, where these are few, where there are more rows than
    the C++ kernel is good for, or where the head computes in another dtype."""
    rows, size = hidden.shape[0] * hidden.shape[1], hidden.shape[2]
    if (
        rows * head.weight.shape[0] * hidden.itemsize < _LEAST_BYTES
        or rows > fast_rows(hidden.dtype, size)
        or hidden.dtype != head.weight.dtype
        or torch.is_autocast_enabled("cpu")
    ):
        return head(hidden)
    return Predictions(*lm_head_argmax(hidden, head.weight, head.bias, backend="cpp"))
