"""Fine-tuning with the consistency and autoregressive losses, on transformers' Trainer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import random
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from cllm_kernels import JacobiConfig, JacobiGenerator
from cllm_kernels.spider import is_degenerate

from .collect import REPEATS, without_degenerate
from .losses import SEGMENTS, causal_lm, packed_forward
from .packing import TrajectoryDataset, collate
from .rows import check_rows
from .settings import TrainConfig

_MEDIAN_OF = 5  # AR losses that the alarm looks at, so that a single bad step does not set it off
PARTS = ("ar_loss", "consistency_loss", "target_loss")


class Collapsed(RuntimeError):
    """Training was stopped, because the model ran into repetition or forgot; the message says which."""


class LengthGroups(Sampler[int]):
    """Indices in an order whose batches hold items of about one length, and come in no order of length.

    transformers' ``group_by_length`` lets batches of falling length follow each other, many in a row, which made
    the losses swing with the length. The order follows from the seed and :attr:`epoch`.

    ``prefixes`` holds what the items share, such as their prompts' beginnings: up to ``together`` items of one prefix
    and about one length follow each other.
    """

    def __init__(
        self, lengths: list[int], batch_size: int, seed: int = 0, prefixes: list | None = None, together: int = 1
    ):
        self.lengths = lengths
        self.batch_size = batch_size
        self.prefixes = prefixes or [None] * len(lengths)
        self.together = together
        self.epoch = 0
        self._seed = seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self._seed} {self.epoch}")
        bundles = self._bundles(rng)
        group = max(1, 32 * self.batch_size // self.together)
        members = []
        for first in range(0, len(bundles), group):
            ordered = sorted(bundles[first : first + group], key=lambda bundle: self.lengths[bundle[0]])
            members += itertools.chain(*ordered)
        batches = [members[at : at + self.batch_size] for at in range(0, len(members), self.batch_size)]
        short = batches.pop()  # the one that may be short of items stays last
        rng.shuffle(batches)
        return itertools.chain(*batches, short)

    def _bundles(self, rng: random.Random) -> list[list[int]]:
        """All indices in random order, with up to ``together`` of one prefix in a bundle."""
        order = rng.sample(range(len(self)), len(self))
        if self.together == 1:
            return [[index] for index in order]
        alike: dict = {}
        for index in order:
            alike.setdefault(self.prefixes[index], []).append(index)
        bundles = []
        for members in alike.values():
            # lengths that are blurred: bundles of about one length, and other ones in each epoch
            blurred = {index: self.lengths[index] + rng.gauss(0, 8) for index in members}
            members.sort(key=blurred.__getitem__)
            count = -(-len(members) // self.together)
            edges = [round(part * len(members) / count) for part in range(count + 1)]
            bundles += [members[begin:end] for begin, end in itertools.pairwise(edges)]
        rng.shuffle(bundles)
        return bundles


class ConsistencyTrainer(Trainer):
    """transformers' Trainer with the losses of a CLLM; each is logged beside their weighted sum."""

    def __init__(self, *args, config: TrainConfig, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the loss is a mean per batch
        self.weights = dict(
            zip(PARTS, (config.ar_weight, config.consistency_weight, config.target_weight), strict=True)
        )
        self.parts: list[torch.Tensor] = []  # losses since they were last logged
        rows = self.train_dataset.rows
        starts = [row.get("prefix_length", 0) for row in rows]
        lengths = [
            len(row["prompt_ids"]) + len(row["output_ids"]) - start for row, start in zip(rows, starts, strict=True)
        ]
        prefixes = [tuple(row["prompt_ids"][:start]) for row, start in zip(rows, starts, strict=True)]
        self.sampler = LengthGroups(
            lengths, self.args.per_device_train_batch_size, config.seed, prefixes, config.prefix_rows
        )

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        blocks = inputs.pop("blocks", None)
        inputs["predict"] = self.train_dataset.on_policy
        parts, predictions = model(packed=inputs)
        self.parts.append(parts.detach())
        if predictions is not None:
            self.train_dataset.advance(blocks, predictions.tolist())
        loss = (parts * parts.new_tensor(list(self.weights.values()))).sum()
        return (loss, {}) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if self.parts and "loss" in logs:
            means = torch.stack(self.parts).mean(0).tolist()
            # From the parts, which checkpoints keep: transformers forgets what was not logged before one.
            logs["loss"] = sum(weight * mean for weight, mean in zip(self.weights.values(), means, strict=True))
            logs |= dict(zip(self.weights, means, strict=True))
            self.parts.clear()
        super().log(logs, *args, **kwargs)


class _Epochs(TrainerCallback):
    """Tells the draws which epoch it is."""

    def __init__(self, trainer: ConsistencyTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.sampler.epoch = int(state.epoch)
        self.trainer.train_dataset.set_epoch(int(state.epoch))


class Alarm(TrainerCallback):
    """Probes the model every ``probe_steps`` steps, and raises :class:`Collapsed` where it ran into repetition or the
    AR loss went up for good.

    A probe decodes prompts of the rows by Jacobi decoding; ``probes`` holds step, tokens per forward and the share of
    outputs that run into repetition.
    """

    def __init__(self, trainer: ConsistencyTrainer, config: TrainConfig, tokenizer: PreTrainedTokenizerBase):
        self.trainer = trainer
        self.config = config
        self.probes: list[dict] = []
        self.recent: list[float] = []  # AR losses as logged
        self.lowest = math.inf  # median of _MEDIAN_OF of them
        rows = trainer.train_dataset.rows
        chosen = rows[:: max(1, len(rows) // config.probe_prompts)][: config.probe_prompts]
        self._block_size = chosen[0].get("block_size") or 16
        self._length = max(len(row["output_ids"]) for row in chosen)
        self._prompts = tokenizer.pad(
            {"input_ids": [row["prompt_ids"] for row in chosen]}, padding_side="left", return_tensors="pt"
        )

    def on_train_begin(self, args, state, control, **kwargs):
        if self.config.probe_steps and not self.probes:
            self._probe(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.config.probe_steps and state.global_step % self.config.probe_steps == 0:
            self._probe(state.global_step)

    def _probe(self, step: int) -> None:
        model = causal_lm(self.trainer.accelerator.unwrap_model(self.trainer.model))
        generator = JacobiGenerator(model, JacobiConfig(block_size=self._block_size))
        inputs = {key: value.to(model.device) for key, value in self._prompts.items()}
        sequences = generator.generate(**inputs, do_sample=False, max_new_tokens=self._length)
        width, run = inputs["input_ids"].shape[1], generator.statistics
        outputs = [tokens[width : width + row.tokens] for tokens, row in zip(sequences.tolist(), run.rows, strict=True)]
        share = sum(is_degenerate(output, repeats=REPEATS) for output in outputs) / len(outputs)
        self.probes.append({"step": step, "tokens_per_forward": run.tokens_per_forward, "degenerate": share})
        if share > self.probes[0]["degenerate"] + self.config.alarm_repetition:
            before = self.probes[0]["degenerate"]
            raise Collapsed(
                f"step {step}: {share:.0%} of the probed outputs run into repetition, {before:.0%} did at the start; "
                "a lower learning rate or a higher ar_weight may keep the model"
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("ar_loss")
        if loss is None:
            return
        if not all(math.isfinite(logs[name]) for name in PARTS):
            raise Collapsed(
                f"step {state.global_step}: a loss is not finite: " + ", ".join(f"{n} {logs[n]}" for n in PARTS)
            )
        self.recent = [*self.recent, loss][-_MEDIAN_OF:]
        if len(self.recent) < _MEDIAN_OF:
            return
        loss = statistics.median(self.recent)
        self.lowest = min(self.lowest, loss)
        if loss > self.config.alarm_ar * self.lowest and loss > self.lowest + 0.5:
            raise Collapsed(
                f"step {state.global_step}: the AR loss is {loss:.3f} and was {self.lowest:.3f} at its lowest; "
                "the model forgets; a lower learning rate or a higher ar_weight may keep it"
            )


class _Checkpoints(TrainerCallback):
    """Adds to each checkpoint what transformers does not keep. A checkpoint is whole once this file of each process
    is there, since it is written last."""

    NAME = "cllm_state_{}.json"

    def __init__(self, trainer: ConsistencyTrainer, alarm: Alarm, settings: dict):
        self.trainer = trainer
        self.alarm = alarm
        self.settings = settings

    def on_save(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.NAME.format(args.process_index)
        content = {
            "settings": self.settings,
            "processes": args.world_size,
            "live": self.trainer.train_dataset.live,
            "parts": [part.tolist() for part in self.trainer.parts],
            "probes": self.alarm.probes,
            "recent": self.alarm.recent,
            "lowest": self.alarm.lowest if math.isfinite(self.alarm.lowest) else None,
        }
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(content))
        os.replace(temporary, path)

    @classmethod
    def newest(cls, folder: Path) -> Path | None:
        """The newest whole checkpoint."""
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
        for path in found:
            state = path / cls.NAME.format(0)
            if state.exists():
                processes = json.loads(state.read_text())["processes"]
                if all((path / cls.NAME.format(rank)).exists() for rank in range(processes)):
                    return path
        return None

    def restore(self, path: Path) -> None:
        content = json.loads((path / self.NAME.format(self.trainer.args.process_index)).read_text())
        now = {**self.settings, "processes": self.trainer.args.world_size}
        then = {**content["settings"], "processes": content["processes"]}
        changed = [f"{key} ({then.get(key)!r}, now {now.get(key)!r})" for key in now if then.get(key) != now[key]]
        if changed:
            raise ValueError(f"{path} is of a run with other settings: {', '.join(changed)}")
        self.trainer.train_dataset.live = content["live"]
        self.trainer.parts = [torch.tensor(part, device=self.trainer.args.device) for part in content["parts"]]
        self.alarm.probes = content["probes"]
        self.alarm.recent = content["recent"]
        self.alarm.lowest = math.inf if content["lowest"] is None else content["lowest"]


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    output_dir: str | Path,
    config: TrainConfig,
    notes: dict | None = None,
    target: PreTrainedModel | None = None,
    resume: bool = False,
) -> dict:
    """Trains ``model`` in place and saves it, its tokenizer and ``training_record.json`` to ``output_dir``.

    Under ``torchrun`` or ``accelerate launch`` each process calls this with the same arguments. With LoRA the saved
    model is the merged one.

    Args:
        model: a causal LM in fp32.
        rows: training rows (see :mod:`cllm_trainer.rows`).
        notes: what else belongs into the record, such as where the data came from.
        target: what ``config.target_weight`` holds the model to, with the same tokens; not changed.
        resume: goes on from the newest whole checkpoint under ``output_dir/checkpoints``, where one is, to the same
            weights, bit for bit, as without the interruption.

    Returns:
        The record: settings, data counts, loss history, probes, seconds, versions.

    Raises:
        ValueError: the rows, the tokenizer, the model, the target and the settings do not fit together, or there are
            checkpoints and ``resume`` is False.
        Collapsed: the alarm went off. Checkpoints stay, and no model is written.
    """
    if not rows:
        raise ValueError("no training rows")
    if (config.target_weight > 0) != (target is not None):
        raise ValueError(f"target_weight is {config.target_weight}: a target is needed if it is above 0, and only then")
    if target is not None and target.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"the target has {target.config.vocab_size} tokens, the model {model.config.vocab_size}")
    check_rows(rows, tokenizer, model.config.vocab_size, config.block_size)
    kept, degenerate = without_degenerate(rows) if config.drop_degenerate else (rows, 0)
    _check_window(model, kept)
    output_dir = Path(output_dir)
    folder = output_dir / "checkpoints"
    checkpoint = _Checkpoints.newest(folder)
    if checkpoint is not None and not resume:
        raise ValueError(f"{folder} holds checkpoints of an interrupted run; resume it or remove them")
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="cosine",
        adam_beta2=0.98,
        seed=config.seed,
        bf16=config.bf16,
        remove_unused_columns=False,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        logging_steps=0.01,  # of all steps
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    attention = config.attention if config.attention != "auto" else _attention_for(model, arguments.device)
    if config.gradient_checkpointing and attention != SEGMENTS and any(row.get("prefix_length") for row in kept):
        raise ValueError(
            f"gradient_checkpointing=True with attention {attention or 'of the model'!r}: the rows have a "
            "prefix_length, and the keys of shared prefixes are lost by it; remove prefix_length from the rows"
        )
    model.train()
    trained = _with_lora(model, config) if config.lora_rank else model
    if config.gradient_checkpointing:
        trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    dataset = TrajectoryDataset(
        kept, config.noisy_blocks, config.augment, config.on_policy, config.seed, config.schedule, config.cycle,
        config.chained, config.consistency == "local", config.ar_on == "truth",
    )  # fmt: skip
    if target is not None:
        target = target.eval().to(arguments.device)
    with packed_forward(trained, config.divergence, config.distance_decay, target, attention=attention):
        trainer = ConsistencyTrainer(
            model=trained,
            args=arguments,
            train_dataset=dataset,
            data_collator=functools.partial(collate, pad_token_id=tokenizer.pad_token_id),
            config=config,
        )
        if trainer.is_fsdp_enabled and (config.lora_rank or config.probe_steps):
            raise ValueError(
                f"lora_rank is {config.lora_rank} and probe_steps {config.probe_steps}; both must be 0 under FSDP, "
                "which leaves no process a whole model to merge or to decode with"
            )
        alarm = Alarm(trainer, config, tokenizer)
        checkpoints = _Checkpoints(trainer, alarm, dataclasses.asdict(config) | {"rows": len(kept)})
        for callback in (_Epochs(trainer), alarm, checkpoints):
            trainer.add_callback(callback)
        if checkpoint is not None:
            checkpoints.restore(checkpoint)
        begin, worked = time.perf_counter(), time.process_time()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        state = trainer.accelerator.get_state_dict(trainer.model)
    record = {
        "config": dataclasses.asdict(config),
        "rows": len(kept),
        "degenerate_rows_left_out": degenerate,
        "states": sum(len(row.get("states", [])) for row in kept),
        "output_tokens": sum(len(row["output_ids"]) for row in kept),
        "parameters": model.num_parameters(),
        "trained_parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),  # of all threads; what a shared machine leaves out
        "processes": arguments.world_size,
        "distributed": trainer.accelerator.distributed_type.value,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "history": [
            {key: entry[key] for key in ("step", "loss", *PARTS, "learning_rate")}
            for entry in trainer.state.log_history
            if "ar_loss" in entry
        ],
        "probes": alarm.probes,
        **(notes or {}),
    }
    if config.lora_rank:
        model = trained.merge_and_unload()
        state = model.state_dict()
    if trainer.is_world_process_zero():
        _save(model, state, tokenizer, record, output_dir, getattr(torch, config.save_dtype))
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return record


def _attention_for(model: PreTrainedModel, device: torch.device) -> str | None:
    """What ``attention="auto"`` means for a model; None leaves the model's own."""
    if device.type == "cuda":
        return "flex_attention"
    config = model.config.get_text_config(decoder=True)
    plain = config._attn_implementation == "sdpa" and getattr(config, "attn_logit_softcapping", None) is None
    return SEGMENTS if plain else None


def _check_window(model: PreTrainedModel, rows: list[dict]) -> None:
    """Packed blocks need attention over the whole sequence."""
    text = model.config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    if window is not None and "sliding_attention" in (getattr(text, "layer_types", None) or ("sliding_attention",)):
        longest = max(len(row["prompt_ids"]) + len(row["output_ids"]) for row in rows)
        if longest > window:
            raise ValueError(
                f"the longest row has {longest} tokens and {type(model).__name__} a sliding window of {window}, which "
                "the mask of packed blocks does not know; leave longer rows out"
            )


def _with_lora(model: PreTrainedModel, config: TrainConfig) -> torch.nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora_rank above 0 needs peft: pip install 'cllm_kernels[train]'") from error
    torch.manual_seed(config.seed)  # of the adapters' random half
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules="all-linear",
    )  # fmt: skip
    return get_peft_model(model, lora)


def _save(
    model: PreTrainedModel,
    state: dict,
    tokenizer: PreTrainedTokenizerBase,
    record: dict,
    output_dir: Path,
    dtype: torch.dtype,
) -> None:
    """Writes the model so that what lies in ``output_dir`` loads only when it is whole: config.json comes last."""
    # Not model.to(dtype): that would round the rotary frequencies too, which are not saved.
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    model.load_state_dict(state)  # the caller's model now holds what is saved
    model.config.dtype = dtype
    temporary = output_dir / "saving.part"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=state)
    tokenizer.save_pretrained(temporary)
    (temporary / "training_record.json").write_text(json.dumps(record, indent=1) + "\n")
    (output_dir / "config.json").unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output_dir / path.name)
    temporary.rmdir()
