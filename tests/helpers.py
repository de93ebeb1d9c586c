"""Small random models that the tests share."""

from __future__ import annotations

import random

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from cllm_kernels import backends
from cllm_kernels.decoding.drafts import LookupDrafts

VOCABULARY = 97
PAD, EOS = 0, 1
SPLIT_ROWS = 16  # of csrc/cpu/linear_split.h

COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=PAD,
    eos_token_id=EOS,
    bos_token_id=2,
)

# The windows of 8 are shorter than what the tests decode, so that sliding matters.
FAMILIES = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=16),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=8),
    "gemma2": lambda: Gemma2Config(
        **COMMON,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "phi3": lambda: Phi3Config(**COMMON),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
}


def round_alike(dtype: torch.dtype, *rows: int) -> bool:
    """Whether C++ linear layers give a row of x equal bits in calls of so many rows: see `window_linear`."""
    split = dtype == torch.float32 and backends.EXTENSION.cpu_isa() == "amx"
    return not split or len({count >= SPLIT_ROWS for count in rows}) == 1


def make_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose reference attention is transformers' eager one."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    config._attn_implementation = "eager"  # SDPA skips Gemma2's soft cap in some releases
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def make_prompts(rows: int, width: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded random prompts; every other row is shorter."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (rows, width), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(1, rows, 2):
        attention_mask[row, : 2 + row % (width - 3)] = 0
    input_ids[attention_mask == 0] = PAD
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def count_calls(monkeypatch, module, names) -> dict[str, int]:
    """Counts the calls that a module makes of functions in it, by name."""
    counts = {}
    for name in names:
        monkeypatch.setattr(module, name, counted(counts, name, getattr(module, name)))
    return counts


def counted(counts, name, function):
    """The function, with its calls counted by that name."""

    def count(*arguments):
        counts[name] = counts.get(name, 0) + 1
        return function(*arguments)

    return count


class Frames:
    """A backend of torch.compile that counts the graphs it gets and runs them as they are."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


class Planted(LookupDrafts):
    """Candidates of which some go on as the output does, for a while."""

    def __init__(self, prompt, starts, order, lone, expected, seed):
        super().__init__(prompt, starts, order, lone)
        self.expected = expected
        self.random = random.Random(seed)

    def candidates(self, state, most):
        windows = state.window[:, None].repeat(1, most, 1)
        for row, (place, produced) in enumerate(zip(self.order, state.produced.tolist())):
            for branch in range(1, most):
                right = self.expected[place][produced : produced + self.random.randrange(state.width)]
                drafts = right + self.random.choices(range(3, VOCABULARY), k=state.width - 1 - len(right))
                windows[row, branch, 1:] = torch.tensor(drafts)
        return windows
