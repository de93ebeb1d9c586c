"""Fine-tuning with the consistency and autoregressive losses, on transformers' Trainer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from .packing import IGNORE, TrajectoryDataset, additive_mask, collate


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    Attributes:
        epochs, batch_size, learning_rate, weight_decay, warmup_steps, seed: as in transformers'
            ``TrainingArguments``; AdamW, cosine schedule.
        noisy_blocks: Jacobi states packed behind each clean sequence.
        augment: share of the states that get some drafts set right.
        on_policy: whether the states move on with the model that is trained, one Jacobi iteration a visit
            (:meth:`cllm_trainer.packing.TrajectoryDataset.advance`), rather than stay those of the rows.
        consistency_weight: of the global consistency loss (CLLM, eq. 4): forward KL from the model's own
            clean prediction, gradient stopped, to its prediction from the noisy block.
        distance_decay: how much less each further draft behind the first wrong one weighs in the consistency loss
            (:func:`losses`); 1 weighs all alike, as the paper does.
        ar_weight: of the cross entropy on the clean output. The paper takes 10 for models of 7B; 1 is what
            suits models of a few million parameters.
        target_weight: of the KL from the prediction of a frozen target (the ``target`` of :func:`train`) to the
            model's, on the clean output. It keeps the quality where the target is unsure.
        save_dtype: storage type of the saved weights.
    """

    epochs: float = 1.0
    batch_size: int = 32
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 100
    noisy_blocks: int = 4
    augment: float = 0.5
    on_policy: bool = False
    consistency_weight: float = 1.0
    distance_decay: float = 1.0
    ar_weight: float = 1.0
    target_weight: float = 0.0
    seed: int = 0
    save_dtype: str = "bfloat16"


def losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    student: torch.Tensor | None = None,
    teacher: torch.Tensor | None = None,
    distance: torch.Tensor | None = None,
    decay: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The autoregressive and the global consistency loss of one packed batch.

    Args:
        logits: ``[B, T, V]``.
        labels, student, teacher, distance: as :func:`cllm_trainer.packing.collate` makes them.
        decay: a pair at distance ``d >= 1`` has the weight ``decay ** (d - 1)``. Pairs at distance 0 agree by
            themselves and have none.

    Returns:
        Mean cross entropy over the labelled positions and weighted mean of the KL over the pairs (nats; 0 without
        pairs).
    """
    flat = logits.flatten(0, 1).float()
    ar = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE)
    if student is None:
        return ar, ar.new_zeros(())
    apart = distance > 0
    weights = decay ** (distance[apart] - 1).float()
    target = flat[teacher[apart]].detach().log_softmax(-1)
    divergence = F.kl_div(flat[student[apart]].log_softmax(-1), target, log_target=True, reduction="none").sum(-1)
    return ar, (weights * divergence).sum() / weights.sum().clamp(min=1)


def target_loss(logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean KL from ``reference`` to ``logits``, both ``[B, T, V]``, over the labelled positions (nats)."""
    labelled = labels != IGNORE
    target = reference[labelled].float().log_softmax(-1)
    return F.kl_div(logits[labelled].float().log_softmax(-1), target, log_target=True, reduction="sum") / len(target)


class LengthGroups(Sampler[int]):
    """Indices in an order whose batches hold items of about one length, and come in no order of length.

    transformers' ``group_by_length`` lets batches of falling length follow each other, many in a row, which made
    the losses swing with the length.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int = 0):
        self.lengths = lengths
        self.batch_size = batch_size
        self._random = random.Random(seed)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = self._random.sample(range(len(self)), len(self))
        group = 32 * self.batch_size
        batches = []
        for first in range(0, len(order), group):
            members = sorted(order[first : first + group], key=self.lengths.__getitem__)
            batches += [members[at : at + self.batch_size] for at in range(0, len(members), self.batch_size)]
        short = batches.pop()  # the one that may be short of items stays last
        self._random.shuffle(batches)
        return itertools.chain(*batches, short)


class ConsistencyTrainer(Trainer):
    """transformers' Trainer with the losses of a CLLM; each is logged beside their weighted sum."""

    def __init__(self, *args, config: TrainConfig, target: PreTrainedModel | None, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean per batch
        self.weights = {
            "ar_loss": config.ar_weight,
            "consistency_loss": config.consistency_weight,
            "target_loss": config.target_weight,
        }
        self._decay = config.distance_decay
        self._target = target
        self._parts: list[torch.Tensor] = []

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset.rows
        lengths = [len(row["prompt_ids"]) + len(row["output_ids"]) for row in rows]
        return LengthGroups(lengths, self.args.per_device_train_batch_size, self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pairs = {key: inputs.pop(key, None) for key in ("labels", "student", "teacher", "distance")}
        blocks = inputs.pop("blocks", None)
        if "attention_mask" in inputs:
            inputs["attention_mask"] = additive_mask(inputs["attention_mask"], self.model.dtype)
        outputs = model(**inputs, use_cache=False)
        parts = [*losses(outputs.logits, **pairs, decay=self._decay)]
        if self._target is None:
            parts.append(parts[0].new_zeros(()))
        else:
            # the target needs the clean sequences alone, and these stand first
            width = int((pairs["labels"] != IGNORE).any(0).nonzero().max()) + 1
            with torch.no_grad():
                reference = self._target(inputs["input_ids"][:, :width], use_cache=False).logits
            parts.append(target_loss(outputs.logits[:, :width], reference, pairs["labels"][:, :width]))
        self._parts.append(torch.stack(parts).detach())
        if blocks and self.train_dataset.on_policy:
            with torch.no_grad():
                predictions = outputs.logits.flatten(0, 1)[pairs["student"]].argmax(-1)
            self.train_dataset.advance(blocks, predictions.tolist())
        loss = sum(weight * part for weight, part in zip(self.weights.values(), parts, strict=True))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if self._parts and "loss" in logs:
            logs |= dict(zip(self.weights, torch.stack(self._parts).mean(0).tolist(), strict=True))
            self._parts.clear()
        super().log(logs, *args, **kwargs)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    output_dir: str | Path,
    config: TrainConfig,
    notes: dict | None = None,
    target: PreTrainedModel | None = None,
) -> dict:
    """Trains ``model`` in place and saves it, its tokenizer and ``training_record.json`` to ``output_dir``.

    Args:
        model: a causal LM in fp32.
        rows: training rows (see :mod:`cllm_trainer.packing`).
        notes: what else belongs into the record, such as where the data came from.
        target: what ``config.target_weight`` holds the model to, with the same tokens; not changed.

    Returns:
        The record: settings, data counts, loss history, seconds, versions.
    """
    if not rows:
        raise ValueError("no training rows")
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token")
    if (config.target_weight > 0) != (target is not None):
        raise ValueError(f"target_weight is {config.target_weight}: a target is needed if it is above 0, and only then")
    if target is not None and target.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"the target has {target.config.vocab_size} tokens, the model {model.config.vocab_size}")
    output_dir = Path(output_dir)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="cosine",
        adam_beta2=0.98,
        seed=config.seed,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=0.01,  # of all steps
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    trainer = ConsistencyTrainer(
        model=model,
        args=arguments,
        train_dataset=TrajectoryDataset(rows, config.noisy_blocks, config.augment, config.on_policy, config.seed),
        data_collator=functools.partial(collate, pad_token_id=tokenizer.pad_token_id),
        config=config,
        target=target and target.eval(),
    )
    begin = time.perf_counter()
    trainer.train()
    record = {
        "config": dataclasses.asdict(config),
        "rows": len(rows),
        "states": sum(len(row.get("states", [])) for row in rows),
        "output_tokens": sum(len(row["output_ids"]) for row in rows),
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - begin, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "history": [
            {key: entry[key] for key in ("step", "loss", *trainer.weights, "learning_rate")}
            for entry in trainer.state.log_history
            if "ar_loss" in entry
        ],
        **(notes or {}),
    }
    # Not model.to(dtype): that would round the rotary frequencies too, which are not saved.
    dtype = getattr(torch, config.save_dtype)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)  # the caller's model now holds what is saved
    model.config.dtype = dtype
    model.save_pretrained(output_dir, state_dict=state)
    tokenizer.save_pretrained(output_dir)
    (output_dir / "training_record.json").write_text(json.dumps(record, indent=1) + "\n")
    return record
