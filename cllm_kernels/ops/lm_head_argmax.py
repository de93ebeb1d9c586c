"""The greedy predictions of a window from its hidden states, without its logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .. import backends
from ._library import check_float, check_last_dim, check_rank, check_same, check_shape, register


def lm_head_argmax(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Argmax and maximum of logits = softcap(scale * (hidden Wᵀ + bias)), which are not written to memory.

    hidden [B, n, H], weight [V, H] and bias [V], all of one dtype (float32, bfloat16, float16) and on one device,
    with a contiguous last dimension and otherwise free strides.

    Logits are rounded to that dtype where the unfused path rounds: after the linear layer, whose sums are accumulated
    in float32 (never in TF32) and take the bias before they are rounded, and after each of the operations that follow.
    So what the unfused path makes a tie is a tie here too. The order of a sum is not fixed: two backends may round a
    logit to neighbouring numbers.
    scale: a factor of the logits, 1 means none (Cohere's logit_scale; Granite divides: give 1 / logits_scaling).
    softcap: c > 0 replaces each logit x by c * tanh(x / c), in three operations, behind the scale (Gemma 2).

    Returns index int64 [B, n] and value float32 [B, n], the largest logit. Ties break to the lowest index. NaN counts
    as the largest, as in `torch.argmax`: then value is NaN, and index the lowest one whose logit is NaN. -inf is an
    ordinary value. Nothing is mutated. For inference: gradients are not defined.

    Backends are "triton" and "torch", the reference; "auto" takes the reference on the CPU.

    Raises ValueError on shapes, dtypes, devices, strides or numbers that do not fit, and RuntimeError on a backend that
    cannot run.
    """
    return _call(hidden, weight, bias, scale, softcap, backend)


def _check(hidden, weight, bias, scale, softcap) -> None:
    check_rank("hidden", hidden, "B, n, H")
    check_rank("weight", weight, "V, H")
    check_shape("weight", weight, (weight.size(0), hidden.size(2)))
    if weight.size(0) < 1 or weight.size(1) < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; V and H must be at least 1")
    check_float("hidden", hidden)
    check_same("weight", weight, "hidden", hidden)
    check_last_dim("hidden", hidden)
    check_last_dim("weight", weight)
    if bias is not None:
        check_shape("bias", bias, (weight.size(0),))
        check_same("bias", bias, "hidden", hidden)
        check_last_dim("bias", bias)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; it must be finite and at least 0, which means none")


def reference(hidden, weight, bias=None, scale=1.0, softcap=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The unfused path, as transformers' models take it."""
    logits = F.linear(hidden, weight, bias)
    if scale != 1.0:
        logits = logits * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    index = logits.argmax(-1)
    return index, logits.gather(-1, index[..., None]).squeeze(-1).float()


def _implementation(
    hidden, weight, bias=None, scale=1.0, softcap=0.0, backend="auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(hidden, weight, bias, scale, softcap)
    if backends.resolve(backend, hidden.device, kernels=("triton",)) == "torch":
        return reference(hidden, weight, bias, scale, softcap)
    from ..triton.lm_head_argmax import lm_head_argmax as run

    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        return run(hidden, weight, bias, scale, softcap)


def _fake(hidden, weight, bias=None, scale=1.0, softcap=0.0, backend="auto") -> tuple[torch.Tensor, torch.Tensor]:
    _check(hidden, weight, bias, scale, softcap)
    shape = hidden.shape[:2]
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=torch.float32)


_call = register(
    "lm_head_argmax(Tensor hidden, Tensor weight, Tensor? bias=None, float scale=1.0, float softcap=0.0, "
    'str backend="auto") -> (Tensor, Tensor)',
    _implementation,
    _fake,
)
