"""The greedy predictions of a window from its hidden states, without its logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .. import backends
from ._library import DTYPE_CODES, check_float, check_last_dim, check_rank, check_same, check_shape, register
from .window_linear import DTYPES, layer_fits


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
    logit to neighbouring numbers. Those of "cpp" are the bits of `window_linear` for as many rows.
    scale: a factor of the logits, 1 means none (Cohere's logit_scale; Granite divides: give 1 / logits_scaling).
    softcap: c > 0 replaces each logit x by c * tanh(x / c), in three operations, behind the scale (Gemma 2).

    Returns index int64 [B, n] and value float32 [B, n], the largest logit. Ties break to the lowest index. NaN counts
    as the largest, as in `torch.argmax`: then value is NaN, and index the lowest one whose logit is NaN. -inf is an
    ordinary value. Nothing is mutated. For inference: gradients are not defined.

    Backends are "cpp" (float32 and bfloat16), "triton" and "torch", the reference.

    Raises ValueError on shapes, dtypes, devices, strides or numbers that do not fit, and RuntimeError on a backend that
    cannot run.
    """
    return _call(hidden, weight, bias, scale, softcap, backend)


def _check(hidden, weight, bias, scale, softcap) -> None:
    shape, dtype = hidden.shape, hidden.dtype
    if not (  # what every forward on the CPU has
        len(shape) == 3
        and shape[2] >= 1
        and dtype in DTYPES
        and hidden.is_cpu
        and hidden.stride()[2] == 1
        and bias is None
        and layer_fits(weight, None, (weight.shape[0], shape[2]), dtype)
    ):
        _check_tensors(hidden, weight, bias)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; it must be finite and at least 0, which means none")


def _check_tensors(hidden, weight, bias) -> None:
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
    chosen = backends.resolve(backend, hidden.device, kernels=("cpp", "triton"))
    if chosen == "cpp" and hidden.dtype not in DTYPES:
        if backend == "cpp":
            raise ValueError(f"backend 'cpp' was asked for but it takes no {hidden.dtype}; allowed are float32 and bfloat16")
        chosen = "torch"
    if chosen == "torch":
        return reference(hidden, weight, bias, scale, softcap)
    if chosen == "cpp":
        hidden = hidden.contiguous()
        batch, width, inputs = hidden.shape
        # half as long as by new_empty with a dtype
        index = torch.empty(batch, width, dtype=torch.int64)
        value = torch.empty(batch, width, dtype=torch.float32)
        if batch * width:
            backends.EXTENSION.lm_head_argmax(
                hidden.data_ptr(), weight.data_ptr(), weight.stride(0), 0 if bias is None else bias.data_ptr(),
                scale, softcap, index.data_ptr(), value.data_ptr(),
                batch * width, inputs, weight.shape[0], DTYPE_CODES[hidden.dtype], torch.get_num_threads(),
            )  # fmt: skip
        return index, value
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
