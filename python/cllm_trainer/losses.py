"""The losses of a CLLM, on logits and, chunk by chunk, on hidden states."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .packing import IGNORE, additive_mask, dense_mask, mask_mod

DIVERGENCES = ("forward", "reverse", "jsd")
CHUNK = 2**26  # logits that exist at a time, 256 MB in fp32


def divergence(student: torch.Tensor, teacher: torch.Tensor, kind: str = "forward") -> torch.Tensor:
    """The divergence of each row of logits ``[M, V]``, in nats: ``"forward"`` KL(teacher || student), ``"reverse"``
    KL(student || teacher), or ``"jsd"``, the Jensen-Shannon divergence."""
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)

    if kind == "forward":
        return kl(teacher, student)
    if kind == "reverse":
        return kl(student, teacher)
    middle = torch.logaddexp(student, teacher) - math.log(2)
    return (kl(student, middle) + kl(teacher, middle)) / 2


def pair_weights(distance: torch.Tensor, decay: float) -> torch.Tensor:
    """Weights of pairs at ``distance`` from 1 on: ``decay ** (distance - 1)``."""
    return decay ** (distance - 1).float()


def losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    student: torch.Tensor | None = None,
    teacher: torch.Tensor | None = None,
    distance: torch.Tensor | None = None,
    decay: float = 1.0,
    kind: str = "forward",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The autoregressive and the consistency loss of one packed batch.

    Args:
        logits: ``[B, T, V]``.
        labels, student, teacher, distance: as :func:`cllm_trainer.packing.collate` makes them.
        decay: a pair at distance ``d >= 1`` has the weight ``decay ** (d - 1)``. Pairs at distance 0 agree by
            themselves and have none.
        kind: of :func:`divergence`.

    Returns:
        Mean cross entropy over the labelled positions and weighted mean of the divergence over the pairs (nats; 0
        without pairs).
    """
    flat = logits.flatten(0, 1).float()
    ar = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE)
    if student is None:
        return ar, ar.new_zeros(())
    apart = distance > 0
    weights = pair_weights(distance[apart], decay)
    apart_by = divergence(flat[student[apart]], flat[teacher[apart]].detach(), kind)
    return ar, (weights * apart_by).sum() / weights.sum().clamp(min=1)


def target_loss(logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean KL from ``reference`` to ``logits``, both ``[B, T, V]``, over the labelled positions (nats)."""
    labelled = labels != IGNORE
    return divergence(logits[labelled], reference[labelled]).mean()


Head = Callable[[torch.Tensor], torch.Tensor]


def _in_chunks(loss: Callable[..., torch.Tensor], rows: int, *columns: torch.Tensor) -> torch.Tensor:
    """The sum of ``loss(*chunk)`` over chunks of ``columns``. Of more than one, backward makes each anew."""
    chunks = list(zip(*(column.split(rows) for column in columns), strict=True))
    if len(chunks) == 1:
        return loss(*chunks[0])
    return torch.stack([checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def chunked_losses(
    head: Head,
    hidden: torch.Tensor,
    batch: dict[str, torch.Tensor],
    decay: float = 1.0,
    kind: str = "forward",
    reference: tuple[Head, torch.Tensor] | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`losses` and :func:`target_loss` of hidden states ``[B, T, D]``, with at most ``chunk`` logits at a time.

    ``head`` takes hidden states to logits. Only positions with a label or in a pair that counts go through it.
    ``reference`` holds the target's head and its hidden states at the positions of ``batch["outputs"]``, ``[K, D']``.
    """
    flat = hidden.flatten(0, 1)
    with torch.no_grad():
        rows = max(1, chunk // head(flat[:1]).shape[-1])
    labels = batch["labels"].flatten()
    labelled = (labels != IGNORE).nonzero()[:, 0]

    def entropy(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(states).float(), wanted, reduction="sum")

    ar = _in_chunks(entropy, rows, flat[labelled], labels[labelled]) / len(labelled)
    consistency = target = ar.new_zeros(())
    if "student" in batch:
        apart = batch["distance"] > 0
        weights = pair_weights(batch["distance"][apart], decay)

        def apart_by(states: torch.Tensor, teacher_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                teacher = head(teacher_states)
            return (weight * divergence(head(states), teacher, kind)).sum()

        if len(weights):
            teacher = flat[batch["teacher"][apart]].detach()
            total = _in_chunks(apart_by, rows // 2 or 1, flat[batch["student"][apart]], teacher, weights)
            consistency = total / weights.sum().clamp(min=1)
    if reference is not None:
        target_head, target_hidden = reference

        def away(states: torch.Tensor, target_states: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                wanted = target_head(target_states)
            return divergence(head(states), wanted).sum()

        states = flat[batch["outputs"].flatten()]
        target = _in_chunks(away, rows // 2 or 1, states, target_hidden) / len(states)
    return ar, consistency, target


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The causal LM inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: PreTrainedModel) -> Head:
    """From the decoder's hidden states to logits, with the scaling and the soft cap that the model has."""
    config, output = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or 1.0
    if getattr(config, "logits_scaling", None):
        scale /= config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)

    def head(states: torch.Tensor) -> torch.Tensor:
        logits = output(states)
        if scale != 1.0:
            logits = logits * scale
        return cap * torch.tanh(logits / cap) if cap else logits

    return head


def check_head(model: PreTrainedModel) -> None:
    """Raises NotImplementedError where :func:`head_of` does not give the model's own logits."""
    tokens = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits.float()
        got = head_of(model)(model.get_decoder()(tokens, use_cache=False).last_hidden_state).float()
    model.train(training)
    if wanted.shape != got.shape or (wanted - got).abs().max() > 1e-3 * wanted.abs().max().clamp(min=1):
        raise NotImplementedError(
            f"the logits of {type(model).__name__} are not its output embedding of its decoder's last hidden state, "
            "which the chunked loss needs"
        )


def hidden_states(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """``[B, T, D]`` of a packed batch: with a dense mask, or a block mask where the model runs FlexAttention."""
    mask = None
    if "seen" in batch:
        seen, group = batch["seen"], batch["group"]
        if model.config._attn_implementation == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask

            rows, width = seen.shape
            mask = create_block_mask(mask_mod(seen, group), rows, None, width, width, device=seen.device)
        else:
            mask = additive_mask(dense_mask(seen, group), model.dtype)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    return model.get_decoder()(**inputs, attention_mask=mask, use_cache=False).last_hidden_state


@contextlib.contextmanager
def packed_forward(
    model: torch.nn.Module, kind: str = "forward", decay: float = 1.0, target: PreTrainedModel | None = None,
    chunk: int = CHUNK, attention: str | None = None,
) -> Iterator[None]:  # fmt: skip
    """Lets ``model(packed=batch)`` give the losses ``[3]`` and the predictions at ``batch["student"]``.

    Within the model's own forward, so that wrappers for several devices see an ordinary forward. Calls without
    ``packed`` stay what they were.
    """
    inner = causal_lm(model)
    check_head(inner)
    original, before = inner.forward, inner.config._attn_implementation
    if attention is not None:
        inner.set_attn_implementation(attention)

    @functools.wraps(original)
    def forward(*args, packed: dict[str, torch.Tensor] | None = None, **kwargs):
        if packed is None:
            return original(*args, **kwargs)
        hidden = hidden_states(inner, packed)
        head, reference = head_of(inner), None
        if target is not None:
            # the target needs the clean sequences alone, and these stand first
            outputs = packed["outputs"]
            width = int(outputs.any(0).nonzero().max()) + 1
            with torch.no_grad():
                states = target.get_decoder()(packed["input_ids"][:, :width], use_cache=False).last_hidden_state
            reference = head_of(target), states[outputs[:, :width]]
        parts = torch.stack(chunked_losses(head, hidden, packed, decay, kind, reference, chunk))
        predictions = None
        if "student" in packed and packed.get("predict"):
            with torch.no_grad():
                chosen = hidden.flatten(0, 1)[packed["student"]]
                rows = max(1, chunk // inner.config.get_text_config().vocab_size)
                predictions = torch.cat([head(part).argmax(-1) for part in chosen.split(rows)])
        return parts, predictions

    inner.forward = forward
    try:
        yield
    finally:
        del inner.forward
        inner.set_attn_implementation(before)
