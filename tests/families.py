"""Small random models of many families."""

from __future__ import annotations

import torch
import transformers
from helpers import COMMON
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

_TOKENS = {name: COMMON[name] for name in ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id")}
# Weights large enough that outputs depend on the whole prompt and do not fall into a repetition at once.
_COMMON = COMMON | dict(initializer_range=0.3)
_MHA = _COMMON | dict(num_key_value_heads=4)
_NO_GQA = {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}
_GPT2 = _TOKENS | dict(n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3)
_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
_MIXED = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
_MLA = dict(
    moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1,
    first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
)  # fmt: skip

# name: (configuration class, its options, what is special). The windows of 8 are shorter than what the tests decode.
EXACT = {
    "Cohere": ("CohereConfig", _COMMON, "scaled logits"),
    "Cohere2": ("Cohere2Config", _COMMON | _MIXED, "sliding and full layers, scaled logits"),
    "DeepSeek-V2": ("DeepseekV2Config", _MHA | _MLA, "MLA, mixture of experts"),
    "DeepSeek-V3": ("DeepseekV3Config", _MHA | _MLA, "MLA, mixture of experts"),
    "Ernie 4.5": ("Ernie4_5Config", _COMMON, ""),
    "Gemma": ("GemmaConfig", _COMMON | dict(head_dim=16), ""),
    "Gemma2": (
        "Gemma2Config",
        _COMMON | _MIXED | dict(
            head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
            tie_word_embeddings=False,  # tied, it repeats its last token
        ),
        "sliding and full layers, soft caps",
    ),
    "Gemma3 (text)": (
        "Gemma3TextConfig", _COMMON | _MIXED | dict(head_dim=16, query_pre_attn_scalar=16, tie_word_embeddings=False),
        "sliding and full layers",
    ),
    "GLM-4": ("Glm4Config", _COMMON | dict(head_dim=16), ""),
    "GPT-2": ("GPT2Config", _GPT2, "learned positions"),
    "GPT-BigCode (StarCoder)": ("GPTBigCodeConfig", _GPT2, "learned positions, one KV head"),
    "GPT-NeoX (Pythia)": ("GPTNeoXConfig", _NO_GQA, ""),
    "gpt-oss": (
        "GptOssConfig", _COMMON | _MIXED | dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2),
        "sinks, sliding and full layers, mixture of experts",
    ),
    "Granite": (
        "GraniteConfig",
        _COMMON | dict(attention_multiplier=0.2, logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0),
        "multipliers, scaled logits",
    ),
    "HunYuan": ("HunYuanDenseV1Config", _COMMON | dict(head_dim=16), ""),
    "Llama": ("LlamaConfig", _COMMON, "Vicuna, DeepSeek-Coder and the CLLMs of the paper too"),
    "Ministral": ("MinistralConfig", _COMMON | _MIXED | dict(head_dim=16), "sliding and full layers"),
    "Mistral": ("MistralConfig", _COMMON | dict(sliding_window=8), "sliding layers"),
    "Mixtral": (
        "MixtralConfig", _COMMON | dict(sliding_window=8, num_local_experts=4, num_experts_per_tok=2),
        "sliding layers, mixture of experts",
    ),
    "OLMo": ("OlmoConfig", _COMMON, ""),
    "OLMo2": ("Olmo2Config", _COMMON, ""),
    "OLMo3": ("Olmo3Config", _COMMON | _MIXED, "sliding and full layers"),
    "OPT": (
        "OPTConfig",
        _TOKENS | dict(
            hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
            word_embed_proj_dim=64, init_std=0.3,
        ),
        "learned positions",
    ),
    "Phi": ("PhiConfig", _COMMON, ""),
    "Phi-3": ("Phi3Config", _COMMON | dict(sliding_window=8), "sliding layers"),
    "Qwen2": (
        "Qwen2Config", _COMMON | dict(use_sliding_window=True, sliding_window=8, max_window_layers=1),
        "sliding and full layers; Qwen2.5 and JacobiForcing too",
    ),
    "Qwen2-MoE": ("Qwen2MoeConfig", _COMMON | _MOE | dict(shared_expert_intermediate_size=32), "mixture of experts"),
    "Qwen3": ("Qwen3Config", _COMMON | dict(head_dim=16), ""),
    "Qwen3-MoE": ("Qwen3MoeConfig", _COMMON | _MOE | dict(head_dim=16), "mixture of experts"),
    "Seed-OSS": ("SeedOssConfig", _COMMON | dict(head_dim=16), ""),
    "SmolLM3": ("SmolLM3Config", _COMMON, "layers without positions"),
    "StableLM": ("StableLmConfig", _COMMON, ""),
    "StarCoder2": ("Starcoder2Config", _COMMON | dict(sliding_window=8), "sliding layers"),
    "CodeGen": ("CodeGenConfig", _GPT2 | dict(rotary_dim=8), ""),
    "Falcon": ("FalconConfig", {k: v for k, v in _NO_GQA.items() if k != "intermediate_size"}, "one KV head"),
    "GPT-J": ("GPTJConfig", _GPT2 | dict(rotary_dim=8), ""),
}  # fmt: skip
# Families that run with their own attention, before which release of transformers; None: with all that are known.
NATIVE = {"CodeGen": "5.24", "Falcon": None, "GPT-J": "5.24"}
REFUSED = {
    "BLOOM": ("BloomConfig", _TOKENS | dict(hidden_size=64, n_layer=2, n_head=4), ""),
    "Falcon with ALiBi": (
        "FalconConfig", {k: v for k, v in _NO_GQA.items() if k != "intermediate_size"} | dict(alibi=True), ""
    ),
    "GPT-Neo": (
        "GPTNeoConfig",
        _TOKENS | dict(
            hidden_size=64, num_layers=2, num_heads=4, max_position_embeddings=256, window_size=8, intermediate_size=96,
            attention_types=[[["global", "local"], 1]],
        ),
        "",
    ),
    "LFM2": ("Lfm2Config", _COMMON | dict(layer_types=["conv", "full_attention"]), ""),
    "Llama-4 (text)": (
        "Llama4TextConfig",
        _COMMON | dict(
            head_dim=16, intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1, attention_chunk_size=8
        ),
        "",
    ),
    "Mamba": ("MambaConfig", _TOKENS | dict(hidden_size=64, num_hidden_layers=2, state_size=4), ""),
    "MPT": ("MptConfig", _TOKENS | dict(d_model=64, n_layers=2, n_heads=4, max_seq_len=256), ""),
    "Qwen3-Next": (
        "Qwen3NextConfig",
        _COMMON | _MOE | dict(
            head_dim=16, shared_expert_intermediate_size=32, linear_num_value_heads=2, linear_num_key_heads=2,
            linear_key_head_dim=16, linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
        ),
        "",
    ),
}  # fmt: skip
FAMILIES = EXACT | REFUSED


def make_family(name: str, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model of a family, whose reference attention is transformers' eager one."""
    torch.manual_seed(seed)
    class_name, options, _ = FAMILIES[name]
    config: PretrainedConfig = getattr(transformers, class_name)(**options)
    config._attn_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).eval()
