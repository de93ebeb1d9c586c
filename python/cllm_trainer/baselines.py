"""What Jacobi decoding is measured against: a small draft model, and Medusa-style heads on the target.

Both are minimal: the draft is a smaller model of the target's family that is distilled from it, for transformers'
assisted generation; the heads decode greedily along one chain, without Medusa's tree of candidates.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import trange
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from cllm_kernels.decoding import CACHE_NAME

from .losses import divergence
from .packing import IGNORE, TrajectoryDataset, collate
from .rows import check_rows


def make_draft(target: PreTrainedModel, layers: int = 1, seed: int = 0) -> PreTrainedModel:
    """A model of the target's architecture with its first ``layers`` layers, and its embeddings and norms."""
    total = target.config.num_hidden_layers
    if not 1 <= layers < total:
        raise ValueError(f"layers is {layers}; the target has {total}, and the draft must have fewer and at least 1")
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    torch.manual_seed(seed)
    draft = AutoModelForCausalLM.from_config(config).to(target.dtype)
    draft.load_state_dict(target.state_dict(), strict=False)
    return draft


def _batches(rows: list[dict], steps: int, batch_size: int, pad: int, seed: int) -> Iterable[dict[str, torch.Tensor]]:
    dataset, rng = TrajectoryDataset(rows), random.Random(seed)
    for _ in trange(steps, unit="step", desc="distil"):
        yield collate([dataset[index] for index in rng.choices(range(len(rows)), k=batch_size)], pad)


def distil_draft(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    output_dir: str | Path,
    layers: int = 1,
    steps: int = 300,
    warm_up: float = 0.5,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> dict:
    """Distils a draft model (:func:`make_draft`) from ``target`` and saves it in bf16.

    A ``warm_up`` share of the steps takes the forward KL on the rows' outputs, since samples of a raw draft teach
    nothing; the others the reverse KL on samples of the draft (on-policy distillation: Agarwal et al. 2024,
    arXiv 2306.13649; as a baseline of CLLM: online speculative decoding, Liu et al. 2023, arXiv 2310.07177).

    Returns:
        A record with the divergence of each step.
    """
    check_rows(rows, tokenizer, target.config.vocab_size)
    draft = make_draft(target, layers, seed)
    target.eval()
    optimizer = torch.optim.AdamW(draft.parameters(), lr=learning_rate)
    history = []
    for step, batch in enumerate(_batches(rows, steps, batch_size, tokenizer.pad_token_id, seed)):
        on_policy = step >= warm_up * steps
        ids, outputs = batch["input_ids"], batch["outputs"]
        if on_policy:
            ids, outputs = _samples(draft, tokenizer, rows, batch_size, seed + step)
        draft.train()
        logits = draft(ids, use_cache=False).logits[outputs]
        with torch.no_grad():
            wanted = target(ids, use_cache=False).logits[outputs]
        loss = divergence(logits, wanted, "reverse" if on_policy else "forward").mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        history.append(loss.item())
    draft.eval().to(torch.bfloat16).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    record = {
        "layers": layers,
        "steps": steps,
        "warm_up": warm_up,
        "parameters": draft.num_parameters(),
        "history": history,
    }
    (Path(output_dir) / "training_record.json").write_text(json.dumps(record) + "\n")
    return record


@torch.no_grad()
def _samples(
    draft: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled outputs of the draft on prompts of one length, and the positions that predict them up to EOS."""
    rng = random.Random(seed)
    width = len(rng.choice(rows)["prompt_ids"])
    same = [row["prompt_ids"] for row in rows if len(row["prompt_ids"]) == width]
    prompts = torch.tensor(rng.choices(same, k=count))
    lengths = sorted(len(row["output_ids"]) for row in rows)
    torch.manual_seed(seed)
    ids = draft.eval().generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=lengths[int(0.95 * len(lengths))],  # a raw draft's samples hardly end by themselves
    )  # fmt: skip
    new = ids[:, width:]
    ended = (new == tokenizer.eos_token_id).long()
    outputs = torch.zeros_like(ids, dtype=torch.bool)
    outputs[:, width - 1 : -1] = ended.cumsum(1) - ended == 0
    return ids, outputs


class MedusaHeads(nn.Module):
    """Heads that predict the 2nd, 3rd, ... token ahead from the target's last hidden state (Cai et al. 2024, arXiv
    2401.10774, Medusa-1): a residual block each, and the target's own frozen LM head behind it."""

    def __init__(self, hidden_size: int, count: int):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(count))
        for block in self.blocks:  # begins as the next token's own prediction
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` to ``[count, ..., D]``."""
        return torch.stack([hidden + F.silu(block(hidden)) for block in self.blocks])

    def save(self, path: str | Path) -> None:
        save_file(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> MedusaHeads:
        """Raises ValueError where the file holds no such heads."""
        try:
            state = load_file(path)
            heads = cls(state["blocks.0.weight"].shape[0], len(state) // 2)
            heads.load_state_dict(state)
        except (KeyError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} holds no heads of cllm-train medusa ({type(error).__name__}: {error})") from None
        return heads


def train_medusa(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    path: str | Path,
    count: int = 4,
    steps: int = 300,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Trains heads on the rows' outputs with the target frozen, and saves them; returns the losses.

    Head k counts 0.8 ** k, as Medusa weighs them.
    """
    check_rows(rows, tokenizer, target.config.vocab_size)
    heads = MedusaHeads(target.config.hidden_size, count)
    target.eval()
    head = target.get_output_embeddings()
    optimizer = torch.optim.AdamW(heads.parameters(), lr=learning_rate, weight_decay=0.0)
    losses = []
    for batch in _batches(rows, steps, batch_size, tokenizer.pad_token_id, seed):
        with torch.no_grad():
            hidden = target.get_decoder()(batch["input_ids"], use_cache=False).last_hidden_state
        ahead = heads(hidden)
        loss = hidden.new_zeros(())
        for number in range(count):
            labels = F.pad(batch["labels"], (0, number + 1), value=IGNORE)[:, number + 1 :]
            kept = (labels != IGNORE) & batch["outputs"]
            if kept.any():
                loss = loss + 0.8**number * F.cross_entropy(head(ahead[number][kept]), labels[kept])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    heads.save(path)
    return losses


@torch.inference_mode()
def medusa_generate(
    model: PreTrainedModel, heads: MedusaHeads, input_ids: torch.Tensor, max_new_tokens: int, eos: list[int]
) -> tuple[list[int], int]:
    """Greedy decoding with Medusa heads of one sequence ``[1, P]``: its new tokens, and the forwards it took.

    Each forward checks the heads' guesses behind the last token; the longest right run and the token that follows it
    are committed, so the tokens are those of greedy decoding.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    cache, tokens, forwards = DynamicCache(config=model.config), [], 0
    window, known = input_ids, 0
    while True:
        hidden = decoder(window, use_cache=True, **{CACHE_NAME: cache}).last_hidden_state[0]
        forwards += 1
        guesses = window[0, known:] if tokens else window[0, :0]
        start = window.shape[1] - 1 - len(guesses)
        predicted = head(hidden[start:]).argmax(-1)
        agreed = (guesses == predicted[:-1]).long().cumprod(0).sum().item()
        new = predicted[: agreed + 1].tolist()[: max_new_tokens - len(tokens)]
        for place, token in enumerate(new):
            if token in eos:
                return tokens + new[: place + 1], forwards
        tokens += new
        if len(tokens) >= max_new_tokens:
            return tokens, forwards
        if len(guesses) > agreed:
            cache.crop(agreed - len(guesses))  # removes the wrong ones
        ahead = head(heads(hidden[start + agreed])).argmax(-1)
        window, known = torch.cat((predicted[agreed : agreed + 1], ahead))[None], 1
