"""The losses of a CLLM, on logits and, chunk by chunk, on hidden states."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from cllm_kernels.decoding import CACHE_NAME

from .packing import IGNORE, additive_mask, dense_mask, mask_mod, prefixed_mask

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


def _segment_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, *, segments, **options):
    """Attention of :func:`_in_segments`: each segment's own, in fp32. Of ``[1, H, N, D]``, ``[1, N, H, D]``."""
    unknown = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"attention {SEGMENTS!r} knows no {', '.join(unknown)}; take 'eager'")
    with torch.autocast(query.device.type, enabled=False):
        queries, keys, values = query.float(), key.float(), value.float()
        repeats = queries.shape[1] // keys.shape[1]
        if repeats > 1:
            keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        sizes = [size for size, _, _ in segments]
        parts = [states.split(sizes, 2) for states in (queries, keys, values)]  # the gradient of slices would cost more
        outputs = []
        for (_, prefix, mask), q, k, v in zip(segments, *parts, strict=True):
            if prefix is not None:
                k, v = (torch.cat((part[prefix], own), 2) for part, own in zip(parts[1:], (k, v), strict=True))
            outputs.append(F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, scale=scaling))
    return torch.cat(outputs, 2).transpose(1, 2).to(query.dtype), None


# Rows of a batch one behind the other instead of padded, for the CPU. In fp32 under autocast too, since the backward
# pass of torch 2.13's attention takes 3.6 times as long in bf16 on the CPU.
SEGMENTS = "cllm_segments"
AttentionInterface.register(SEGMENTS, _segment_attention)
AttentionMaskInterface.register(SEGMENTS, lambda *_, **__: None)


def _in_segments(decoder: torch.nn.Module, batch: dict[str, torch.Tensor], clean: bool) -> torch.Tensor:
    """:func:`hidden_states` without padding: prefixes and rows stand one behind the other, as segments of one row."""
    kept = batch["group"] == 0 if clean else batch["group"] >= 0
    lengths = kept.sum(1).tolist()
    ids, positions = [batch["input_ids"][kept]], [batch["position_ids"][kept]]
    segments: list[tuple[int, int | None, torch.Tensor | None]] = []  # size, number of the prefix' segment, mask
    prefix_of, sizes = [None] * len(lengths), []
    if "prefix_ids" in batch:
        sizes = batch["prefix_lengths"].tolist()
        prefix_of = [number if sizes[number] else None for number in batch["prefix_of"].tolist()]
        segments += [(size, None, None) for size in sizes]
        places = torch.arange(batch["prefix_ids"].shape[1], device=kept.device).expand_as(batch["prefix_ids"])
        valid = places < batch["prefix_lengths"][:, None]
        ids.insert(0, batch["prefix_ids"][valid])
        positions.insert(0, places[valid])
    for row, (size, prefix) in enumerate(zip(lengths, prefix_of, strict=True)):
        seen, group = batch["seen"][row, :size], batch["group"][row, :size]
        mask = None
        if prefix is not None or group[-1] > 0:
            mask = dense_mask(seen[None], group[None])[0, 0]
            if prefix is not None:
                mask = torch.cat((mask.new_ones(size, sizes[prefix]), mask), 1)
            mask = additive_mask(mask, torch.float32)
        segments.append((size, prefix, mask))
    flat = decoder(
        input_ids=torch.cat(ids)[None], position_ids=torch.cat(positions)[None], use_cache=False, segments=segments
    ).last_hidden_state[0]
    hidden = flat.new_zeros(*kept.shape, flat.shape[-1])
    hidden[kept] = flat[sum(sizes) :]
    return hidden


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


def hidden_states(model: PreTrainedModel, batch: dict[str, torch.Tensor], width: int | None = None) -> torch.Tensor:
    """``[B, T, D]`` of a packed batch, or of the first ``width`` positions of its rows, of the clean sequences alone.

    In segments, with a dense mask, or with a block mask where the model runs FlexAttention. A shared prefix goes
    through the model once; the rows that share it get its keys and values, through which its gradient flows.
    """
    decoder, attention = model.get_decoder(), model.config._attn_implementation
    batch = batch | {key: batch[key][:, :width] for key in ("input_ids", "position_ids", "seen", "group")}
    if attention == SEGMENTS:
        return _in_segments(decoder, batch, width is not None)
    seen, group = batch["seen"], batch["group"]
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    cache, prefix, before = None, None, 0
    if "prefix_ids" in batch:
        cache, before = DynamicCache(config=model.config), batch["prefix_ids"].shape[1]
        decoder(batch["prefix_ids"], use_cache=True, **{CACHE_NAME: cache})
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[batch["prefix_of"]], layer.values[batch["prefix_of"]]
        prefix = batch["prefix_lengths"][batch["prefix_of"]]
    if attention == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = seen.shape
        visible = mask_mod(seen, group, prefix, before)
        mask = create_block_mask(visible, rows, None, length, before + length, device=seen.device)
    else:
        mask = dense_mask(seen, group)
        if prefix is not None:
            mask = prefixed_mask(mask, batch["prefix_lengths"], batch["prefix_of"])
        mask = additive_mask(mask, model.dtype)
    return decoder(
        **inputs, attention_mask=mask, use_cache=cache is not None, **{CACHE_NAME: cache}
    ).last_hidden_state


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
                states = hidden_states(target, packed, width)
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
