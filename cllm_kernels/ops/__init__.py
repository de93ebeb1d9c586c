"""The ops of the package, one file each: schema, specification, reference, fake and dispatch."""

from .append_kv import append_kv_
from .block_attention import block_attention
from .converge import converge_
from .lm_head_argmax import lm_head_argmax
from .state import JacobiState
from .window_linear import window_linear
from .window_mlp import window_mlp
from .window_qkv import window_qkv

__all__ = [
    "JacobiState", "append_kv_", "block_attention", "converge_", "lm_head_argmax", "window_linear", "window_mlp",
    "window_qkv",
]  # fmt: skip
