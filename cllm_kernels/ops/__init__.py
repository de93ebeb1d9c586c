"""The ops of the package, one file each: schema, specification, reference, fake and dispatch."""

from .append_kv import append_kv_
from .block_attention import block_attention
from .converge import converge_
from .lm_head_argmax import lm_head_argmax
from .rms_norm import add_rms_norm, rms_norm
from .silu_mul import silu_mul
from .state import JacobiState
from .window_linear import window_linear
from .window_mlp import window_mlp
from .window_qkv import window_qkv

__all__ = [
    "JacobiState", "add_rms_norm", "append_kv_", "block_attention", "converge_", "lm_head_argmax", "rms_norm", "silu_mul",
    "window_linear", "window_mlp", "window_qkv",
]  # fmt: skip
