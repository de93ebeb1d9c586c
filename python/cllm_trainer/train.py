"""Fine-tuning with the consistency and autoregressive losses, on transformers' Trainer."""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from .packing import IGNORE, TrajectoryDataset, additive_mask, collate


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    Attributes:
        epochs, batch_size, learning_rate, weight_decay, warmup_steps, seed: as in transformers'
            ``TrainingArguments``; AdamW, cosine schedule.
        noisy_blocks: Jacobi states packed behind each clean sequence.
        consistency_weight: of the global consistency loss (CLLM, eq. 4): forward KL from the model's own
            clean prediction, gradient stopped, to its prediction from the noisy block.
        ar_weight: of the cross entropy on the clean output. The paper takes 10 for models of 7B; 1 is what
            suits models of a few million parameters.
        save_dtype: storage type of the saved weights.
    """

    epochs: float = 1.0
    batch_size: int = 32
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 100
    noisy_blocks: int = 4
    consistency_weight: float = 1.0
    ar_weight: float = 1.0
    seed: int = 0
    save_dtype: str = "bfloat16"


def losses(
    logits: torch.Tensor, labels: torch.Tensor, student: torch.Tensor | None = None, teacher: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The autoregressive and the global consistency loss of one packed batch.

    Args:
        logits: ``[B, T, V]``.
        labels, student, teacher: as :func:`cllm_trainer.packing.collate` makes them.

    Returns:
        Mean cross entropy over the labelled positions and mean KL over the pairs (nats; 0 without pairs).
    """
    flat = logits.flatten(0, 1).float()
    ar = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORE)
    if student is None:
        return ar, ar.new_zeros(())
    target = flat[teacher].detach().log_softmax(-1)
    consistency = F.kl_div(flat[student].log_softmax(-1), target, log_target=True, reduction="batchmean")
    return ar, consistency


class ConsistencyTrainer(Trainer):
    """transformers' Trainer with the two losses of a CLLM; both are logged beside their sum."""

    def __init__(self, *args, consistency_weight: float, ar_weight: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean per batch
        self._weights = (ar_weight, consistency_weight)
        self._parts: list[torch.Tensor] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pairs = {key: inputs.pop(key, None) for key in ("labels", "student", "teacher")}
        if "attention_mask" in inputs:
            inputs["attention_mask"] = additive_mask(inputs["attention_mask"], self.model.dtype)
        outputs = model(**inputs, use_cache=False)
        parts = torch.stack(losses(outputs.logits, **pairs))
        self._parts.append(parts.detach())
        loss = self._weights[0] * parts[0] + self._weights[1] * parts[1]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if self._parts and "loss" in logs:
            ar, consistency = torch.stack(self._parts).mean(0).tolist()
            logs |= {"ar_loss": ar, "consistency_loss": consistency}
            self._parts.clear()
        super().log(logs, *args, **kwargs)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    output_dir: str | Path,
    config: TrainConfig,
    notes: dict | None = None,
) -> dict:
    """Trains ``model`` in place and saves it, its tokenizer and ``training_record.json`` to ``output_dir``.

    Args:
        model: a causal LM in fp32.
        rows: training rows (see :mod:`cllm_trainer.packing`).
        notes: what else belongs into the record, such as where the data came from.

    Returns:
        The record: settings, data counts, loss history, seconds, versions.
    """
    if not rows:
        raise ValueError("no training rows")
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token")
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
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    trainer = ConsistencyTrainer(
        model=model,
        args=arguments,
        train_dataset=TrajectoryDataset(rows, config.noisy_blocks, config.seed),
        data_collator=functools.partial(collate, pad_token_id=tokenizer.pad_token_id),
        consistency_weight=config.consistency_weight,
        ar_weight=config.ar_weight,
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
            {key: entry[key] for key in ("step", "loss", "ar_loss", "consistency_loss", "learning_rate")}
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
