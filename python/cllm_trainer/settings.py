"""The settings of a training run; each default carries its source."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from .losses import DIVERGENCES, SEGMENTS
from .packing import SCHEDULES

_CLLM = "Kou et al. 2024, arXiv 2403.00835"
_CLLM_CODE = "github.com/hao-ai-lab/Consistency_LLM, cllm/train_cllm_global.py"
_FORCING = "Jacobi Forcing, arXiv 2512.14681"
_BUNDLED = "chosen for the bundled models of 3 million parameters"


def _setting(default: Any, meaning: str, source: str, allowed: tuple = ()) -> Any:
    """A field; ``allowed`` holds its values, or its lowest and its highest one."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, "source": source, "allowed": allowed})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. AdamW with beta2 0.98 and a cosine schedule.

    ``dataclasses.fields(TrainConfig)`` carries the meaning, the allowed values and the default's source of each in its
    metadata, and ``cllm-train settings`` prints them.

    Raises:
        ValueError: a setting is out of its range, or two of them exclude each other.
    """

    epochs: float = _setting(1.0, "passes over the rows", f"{_CLLM}: 1 epoch of most data", (0, None))
    batch_size: int = _setting(32, "rows a step and process", _BUNDLED, (1, None))
    accumulate: int = _setting(1, "steps whose gradients are summed up for one update", "none by default", (1, None))
    learning_rate: float = _setting(3e-4, "of AdamW", _BUNDLED + "; the paper takes 2e-5 for 7B", (0, None))
    weight_decay: float = _setting(0.01, "of AdamW", "torch's default", (0, None))
    warmup_steps: int = _setting(100, "steps of the linear warm-up", _BUNDLED, (0, None))
    noisy_blocks: int = _setting(4, "Jacobi states packed behind each clean sequence", _BUNDLED, (0, None))
    prefix_rows: int = _setting(
        1, "rows a batch takes together of those that share a prefix (prefix_length)", "none share", (1, None)
    )
    block_size: int | None = _setting(
        None, "the n that the rows must have been made for; any without", "none", (2, None)
    )
    schedule: str = _setting(
        "trajectory", "how states are chosen (TrajectoryDataset)", f"{_CLLM}: a random state of the trajectory", SCHEDULES
    )
    cycle: int = _setting(
        16, "blocks over which the noise of schedule cyclic rises", f"{_FORCING}, data set n32w16", (1, None)
    )
    chained: bool = _setting(False, "noisy blocks see the noisy ones before them", f"{_CLLM}; true is {_FORCING}")
    augment: float = _setting(
        0.5, "share of the states that get some drafts set right", f"{_CLLM}: data augmentation", (0, 1)
    )
    on_policy: bool = _setting(
        False, "states move on with the model that is trained, one iteration a visit", f"{_CLLM}: off"
    )
    consistency: str = _setting(
        "global", "teacher: the fixed point, or the next state", f"{_CLLM}: global, which it found better", ("global", "local")
    )
    divergence: str = _setting(
        "forward", "forward or reverse KL from the teacher, or JSD", f"{_CLLM}: forward", DIVERGENCES
    )
    consistency_weight: float = _setting(1.0, "of the consistency loss", f"{_CLLM}: 1", (0, None))
    distance_decay: float = _setting(
        1.0, "weight of each further draft behind the first wrong one", f"{_CLLM}: 1", (0, 1)
    )
    ar_weight: float = _setting(1.0, "of the cross entropy", _BUNDLED + "; the paper takes 10 for 7B", (0, None))
    ar_on: str = _setting(
        "output", "cross entropy on the output, or the truth where there is one", f"{_CLLM}: output", ("output", "truth")
    )
    target_weight: float = _setting(
        0.0, "of the KL from the frozen target on the clean output", f"{_CLLM}: none", (0, None)
    )
    drop_degenerate: bool = _setting(
        True, "leaves out rows that run into repetition", "github.com/hao-ai-lab/Consistency_LLM, cllm/utils.py"
    )
    lora_rank: int = _setting(
        0, "of LoRA on all linear layers; 0 trains everything", f"{_CLLM}: full; its code takes 32", (0, None)
    )
    lora_alpha: int = _setting(16, "of LoRA", _CLLM_CODE, (1, None))
    lora_dropout: float = _setting(0.05, "of LoRA", _CLLM_CODE, (0, 1))
    gradient_checkpointing: bool = _setting(False, "less memory for more time", "off, as in transformers")
    bf16: bool = _setting(False, "computes in bf16, with weights in fp32", "off, as in transformers")
    attention: str = _setting(
        "auto",
        "flex_attention on a GPU; on a CPU cllm_segments (rows without padding) where the model has plain sdpa",
        "FlexAttention skips what the mask hides, and segments cost a CPU least (benchmarks/test_training.py)",
        ("auto", "eager", "sdpa", "flex_attention", SEGMENTS),
    )
    save_steps: int = _setting(
        0, "steps between checkpoints to resume from; 0 for none", "runs of minutes need none", (0, None)
    )
    probe_steps: int = _setting(
        0, "steps between probes: tokens per forward and repetition; 0 for none", "runs of minutes need none", (0, None)
    )
    probe_prompts: int = _setting(16, "prompts that a probe decodes", "own choice: seconds on two cores", (1, None))
    alarm_ar: float = _setting(
        2.0, "stops where the AR loss exceeds this multiple of its lowest and 0.5 nats more", "own choice", (1, None)
    )
    alarm_repetition: float = _setting(
        0.2, "stops where repetitive outputs exceed those of the start by this share", "own choice", (0, 1)
    )
    seed: int = _setting(0, "of all draws", "own choice", (0, 2**32 - 1))
    save_dtype: str = _setting(
        "bfloat16", "storage type of the saved weights", _CLLM_CODE, ("bfloat16", "float16", "float32")
    )

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check(field.name, value, hints[field.name], field.metadata["allowed"])
        if self.on_policy and (self.schedule != "trajectory" or self.consistency == "local"):
            raise ValueError("on_policy=True needs schedule='trajectory' and consistency='global'")
        if self.chained and (self.schedule == "trajectory" or self.consistency == "local"):
            raise ValueError(
                "chained=True needs schedule='random', 'progressive' or 'cyclic', and consistency='global'"
            )
        if self.consistency == "local" and self.schedule != "trajectory":
            raise ValueError("consistency='local' needs schedule='trajectory'")


def _check(name: str, value: Any, hint: Any, allowed: tuple) -> None:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    fits = type(value) in kinds or (float in kinds and type(value) is int) or (value is None and type(None) in kinds)
    if not fits:
        raise ValueError(f"{name} is {value!r}; it must be {' or '.join(kind.__name__ for kind in kinds)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; it must be finite")
    if allowed and isinstance(allowed[0], str):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    elif allowed and value is not None:
        low, high = allowed
        if not value >= low or (high is not None and value > high):
            raise ValueError(
                f"{name} is {value!r}; it must be at least {low}" + (f" and at most {high}" if high else "")
            )


def read_settings(path: str | Path | None, changes: dict[str, Any] | None = None) -> TrainConfig:
    """Settings of a YAML file, with ``changes`` over them.

    Raises:
        ValueError: the file is no YAML, or no mapping, or names a setting that there is not.
    """
    try:
        values = yaml.safe_load(Path(path).read_bytes()) if path else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping of settings to values")
    values |= changes or {}
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    unknown = [str(name) for name in values if name not in names]
    if unknown:
        raise ValueError(f"no such settings: {', '.join(unknown)}; there are {', '.join(names)}")
    return TrainConfig(**values)


def describe() -> str:
    """All settings with their defaults, as a YAML file that says where each default is from."""
    lines = []
    for field in dataclasses.fields(TrainConfig):
        meaning, allowed = field.metadata["meaning"], field.metadata["allowed"]
        choices = f" ({', '.join(allowed)})" if allowed and isinstance(allowed[0], str) else ""
        lines += [f"# {meaning}{choices}; default: {field.metadata['source']}"]
        lines += [yaml.safe_dump({field.name: field.default}).strip()]
    return "\n".join(lines) + "\n"
