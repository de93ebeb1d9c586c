"""Runs a model's linear layers, and whole decoder layers where they are known, by this package while it decodes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast

from .. import backends
from ..backends import resolve
from ..decoding import CACHE_NAME, JacobiCache
from ..ops import block_attention, rms_norm, window_linear, window_mlp, window_qkv
from ..ops._library import FLOAT_DTYPES, watched
from ..ops.decoder_layers import DecoderLayer, DecoderLayers
from ..ops.window_linear import DTYPES, fast_rows
from .attention import from_mask, has_hooks, submodules
from .gpu_layers import GpuLayer, is_known, run_layers
from .swaps import Swaps

# Classes of transformers whose layers are RMSNorm, attention with rotary embedding, RMSNorm and a gated MLP, and where
# each keeps its sliding window.
_FAMILIES: dict[str, Callable[[nn.Module], int | None]] = {
    "Llama": lambda attention: None,
    "Mistral": lambda attention: getattr(attention.config, "sliding_window", None),
    "Qwen2": lambda attention: attention.sliding_window,
    "Qwen3": lambda attention: attention.sliding_window,
}


@dataclasses.dataclass(frozen=True)
class Optimized:
    """What :func:`optimize` did.

    Attributes:
        linears: names of the linear layers that run by ``window_linear``, on the CPU.
        layers: names of the decoder layers that run by ``window_qkv``, ``block_attention`` and ``window_mlp``, on a GPU by
            torch's linear layers and ``rms_norm``, ``append_kv_``, ``block_attention`` and ``silu_mul`` between them.
        decoders: names of the modules that call these layers without looking for masks, defaults and outputs to record.
        left: names of the linear layers and of the decoder layers that were left alone, with the reason.
    """

    linears: tuple[str, ...]
    layers: tuple[str, ...]
    decoders: tuple[str, ...]
    left: dict[str, str]


@contextlib.contextmanager
def optimize(model: nn.Module, backend: str = "auto") -> Iterator[Optimized]:
    """Runs the linear layers of ``model`` by the package's own kernels inside the context, and as before after it.

    Weights stay where they are: nothing is copied or packed, so the state dict, ``save_pretrained`` and weights that
    change are not concerned; a parameter that is replaced during a decode may be in use from the next one on. Calls that
    need gradients, run under autocast or have more rows than pay go to torch as before. Linear layers of another class
    (quantised ones, adapters), with weights of another kind or with a forward that was replaced, on the instance or on its
    class, are left alone; hooks run as they do without it. Decoder layers of Llama, Mistral, Qwen2 and Qwen3, where nothing
    inside them has hooks or was changed, decode a window in one call for all, or in a few calls for each if a layer has hooks,
    and leave out the padding of prompts.

    On a GPU, decoder layers of the same families keep torch's linear layers, and all that stands between two of these takes
    one launch. Linear layers by themselves are left alone there.

    :class:`cllm_kernels.JacobiConfig` has an option, on by default, that does this for each call of generate.

    Yields:
        what was swapped and what was left alone.
    """
    plan = _plan(model, backend)
    with _swaps(plan):
        yield Optimized(tuple(plan.linears), tuple(plan.layers), tuple(plan.decoders), dict(plan.left))


def optimized(model: nn.Module, backend: str) -> Swaps:
    """What :func:`optimize` swaps."""
    return _swaps(_plan(model, backend))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What can be swapped in a model, by name, why the rest cannot, and what it is swapped for, while `facts` hold."""

    facts: list
    linears: dict[str, nn.Module]
    layers: dict[str, nn.Module]
    decoders: dict[str, nn.Module]
    left: dict[str, str]
    forwards: list[tuple[nn.Module, Callable]]


def _swaps(plan: _Plan) -> Swaps:
    return Swaps((module, "forward", forward) for module, forward in plan.forwards)


# Plans hold modules inside a model, so their ids in `facts` cannot pass to others; the model itself they must not hold.
_plans: weakref.WeakKeyDictionary[nn.Module, _Plan] = weakref.WeakKeyDictionary()


def _plan(model: nn.Module, backend: str) -> _Plan:
    """The plan for a model as it is now, which a look at every module is much faster for than making it."""
    facts = _facts(model, backend)
    plan = _plans.get(model)
    if plan is not None and plan.facts == facts:
        return plan
    plan = _Plan(facts, {}, {}, {}, {}, [])
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            reason, swapped = _linear_reason(module, backend), plan.linears
        elif type(module).__name__.endswith("DecoderLayer"):
            reason, swapped = _layer_reason(module, backend), plan.layers
        else:
            continue
        if reason is None:
            swapped[name] = module
        else:
            plan.left[name] = reason
    swapped = plan.layers.values()
    for name, module in model.named_modules():
        if _is_decoder(module) and module.layers and all(layer in swapped for layer in module.layers):
            plan.decoders[name] = module
    for make, modules in (
        (_swapped_linear, plan.linears),
        (functools.partial(_swapped_layer, backend=backend), plan.layers),
        (functools.partial(_swapped_decoder, backend=backend), plan.decoders),
    ):
        plan.forwards.extend((module, make(module)) for module in modules.values())
    if model not in (*plan.linears.values(), *swapped, *plan.decoders.values()):
        _plans[model] = plan
    return plan


def _facts(model: nn.Module, backend: str) -> list:
    """Everything that a plan depends on: modules, their places, classes, hooks, forwards, and what parameters are."""
    facts: list = [backend]
    classes = set()
    for module in submodules(model):
        own = module.__dict__
        classes.add(type(module))
        facts.append((id(module), type(module), "forward" in own, has_hooks(module), id(own["_parameters"])))
        facts.extend((name, id(child)) for name, child in own["_modules"].items())
        for name, tensor in own["_parameters"].items():
            if type(tensor) is nn.Parameter:
                facts.append((name, tensor.dtype, tensor.device, tensor.layout, tensor.stride()))
            elif tensor is not None:
                facts.append((name, type(tensor)))
    facts.append({cls: _replaced(cls) for cls in classes})
    if backend == "auto":
        facts.append(os.environ.get("CLLM_BACKEND"))  # which decides
    return facts


def _replaced(cls: type) -> str | None:
    """What was replaced of a class as a whole, in words, or None: its forward, or functions of its module."""
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    if not _is_of_source(vars(owner)["forward"], owner.__module__, f"{owner.__qualname__}.forward"):
        return f"the forward of {cls.__qualname__} was replaced"
    if cls.__name__.endswith("DecoderLayer"):
        for name in ("apply_rotary_pos_emb", "rotate_half"):
            function = getattr(sys.modules.get(cls.__module__), name, None)
            # the library `kernels` makes a module of the function
            if isinstance(function, types.FunctionType) and not _is_of_source(function, cls.__module__, name):
                return f"{name} of {cls.__module__} was replaced"
    return None


def _is_of_source(function: Callable, module: str, name: str) -> bool:
    """Whether a function is the one that a module's source has by this name, within what decorates it there."""
    while hasattr(function, "__wrapped__"):
        decorator = getattr(function, "__globals__", {}).get("__name__", "")
        if not decorator.startswith("transformers.") and decorator != "torch.utils._contextlib":  # no_grad
            return False
        function = function.__wrapped__
    own = getattr(sys.modules.get(module), "__dict__", None)
    return own is not None and getattr(function, "__globals__", None) is own and function.__qualname__ == name


def _kernels(device: torch.device, backend: str) -> str:
    """What decodes on a device: "cpp", "gpu" or "torch"."""
    if backend == "cpp" and device.type != "cpu":
        return "torch"
    name = resolve(backend, device)
    return "gpu" if name in ("cuda", "triton") else name


def _device(layer: nn.Module) -> torch.device:
    """Of a decoder layer whose parameters are on one."""
    return layer.input_layernorm.weight.device


# Kinds of rotary embeddings that give each position the same angles whatever the others are.
_FIXED_ANGLES = {"default", "linear", "llama3", "yarn"}


def _swapped_linear(module: nn.Linear) -> Callable:
    parameters = module._parameters  # read anew in each call, lest a weight that was replaced stay in use

    def forward(input: torch.Tensor) -> torch.Tensor:
        if "weight" not in parameters:  # taken over while the model runs, as by adapters of PEFT for parameters
            return F.linear(input, module.weight, module.bias)
        weight, bias = parameters["weight"], parameters["bias"]
        if input.dtype != weight.dtype or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return F.linear(input, weight, bias)
        return window_linear(input, weight, bias, "cpp")

    return forward


def _swapped_layer(layer: nn.Module, backend: str) -> Callable:
    before = type(layer).forward.__get__(layer)
    weights = layer.self_attn.q_proj._parameters
    window = _FAMILIES[_family(layer)]
    if _kernels(_device(layer), backend) == "gpu":
        run, rows = GpuLayer(layer, window, backend), math.inf
    else:
        run, rows = _cpu_layer(layer, window), _most_rows(weights["weight"].dtype)

    def takes(hidden_states, cache):
        return (
            type(cache) is JacobiCache
            and not _has_any_global_hook()  # it wants every module inside
            and hidden_states.dtype == weights["weight"].dtype
            and hidden_states.shape[0] * hidden_states.shape[1] <= rows
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(hidden_states.device.type)
        )

    def forward(
        hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
        position_embeddings=None, keep=None, cache=None, **kwargs,
    ):  # fmt: skip
        cache = past_key_values if cache is None else cache
        if not takes(hidden_states, cache):
            return before(
                hidden_states, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
                position_embeddings=position_embeddings, **{CACHE_NAME: cache}, **kwargs,
            )  # fmt: skip
        return run(hidden_states, attention_mask, position_embeddings, cache, keep)

    forward.takes, forward.run = takes, run
    return forward


def _cpu_layer(layer: nn.Module, window: Callable[[nn.Module], int | None]) -> Callable:
    """The computation of a decoder layer by the C++ kernels."""
    attention, mlp = layer.self_attn, layer.mlp
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    query, key, value, output = (getattr(attention, f"{name}_proj")._parameters for name in "qkvo")
    gate, up, down = (getattr(mlp, f"{name}_proj")._parameters for name in ("gate", "up", "down"))

    def weights() -> DecoderLayer:
        """As they are now: one that was replaced must not stay in use."""
        return DecoderLayer(
            first._parameters["weight"], first.variance_epsilon, query["weight"], key["weight"], value["weight"],
            query["bias"], key["bias"], value["bias"],
            None if query_norm is None else query_norm._parameters["weight"],
            None if key_norm is None else key_norm._parameters["weight"],
            0.0 if query_norm is None else query_norm.variance_epsilon,
            output["weight"], output["bias"], second._parameters["weight"], second.variance_epsilon,
            gate["weight"], up["weight"], down["weight"], attention.scaling, window(attention) or 0,
        )  # fmt: skip

    def run(hidden_states, mask, angles, cache, keep):
        cos, sin = _of_rows(angles, hidden_states.shape[0])
        w = weights()
        q, k, v = window_qkv(
            hidden_states, w.norm, w.eps, w.query, w.key, w.value, cos, sin, w.query_bias, w.key_bias, w.value_bias,
            w.query_norm, w.key_norm, w.head_eps, "cpp",
        )  # fmt: skip
        keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), attention.layer_idx)
        lengths, starts, branch = from_mask(mask)
        if keep is not None:
            lengths = lengths + (q.shape[1] - keep)
            q = q[:, -keep:]
            hidden_states = hidden_states[:, -keep:]
        attended, _ = block_attention(
            q, keys, values, lengths, starts, w.scale, w.sliding_window, 0.0, None, branch, cache.backend
        )
        return window_mlp(
            hidden_states, attended.flatten(2), w.output, w.mlp_norm, w.mlp_eps, w.gate, w.up, w.down, w.output_bias, "cpp"
        )

    run.weights = weights
    return run


def _of_rows(angles: tuple[torch.Tensor, torch.Tensor], rows: int) -> tuple[torch.Tensor, ...]:
    """cos and sin ``[B, n, D]``, where a model may give them once for all rows."""
    return tuple(x if x.shape[0] == rows else x.expand(rows, -1, -1) for x in angles)


def _most_rows(dtype: torch.dtype) -> float:
    """How many rows a decoder layer takes.

    With AVX2, AVX-512, with and without bfloat16, and AMX it was measured to be faster than torch's at every number of
    rows. Other CPUs were not measured, and oneDNN multiplies bfloat16 much faster where it alone uses AMX; there a layer
    takes windows.
    """
    isa = backends.EXTENSION.cpu_isa()
    measured = isa == "amx" or isa != "baseline" and not torch.cpu._is_amx_tile_supported()
    return math.inf if measured or dtype == torch.float32 else fast_rows(dtype)


class _Packing:
    """The tokens of a left padded batch ``[B, n]`` in one row, without the padding.

    firsts: the first column of each row that is no padding.

    Attributes:
        counts: of the tokens of each row.
    """

    def __init__(self, firsts: torch.Tensor, width: int):
        self.shape = (firsts.shape[0], width)
        self.counts = (width - firsts).tolist()
        self.places = (torch.arange(width) >= firsts[:, None]).flatten().nonzero()[:, 0]

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, n, ...]`` to ``[1, T, ...]``."""
        return x.flatten(0, 1).index_select(0, self.places)[None]


def _packing(mask: torch.Tensor, width: int, keep: int) -> _Packing | None:
    """How to leave out the padding of ``width`` columns, as a mask of :func:`as_mask` tells of it; None where that does
    not pay, or where not even the last ``keep`` columns are without it."""
    lengths, starts, _ = from_mask(mask)
    firsts = (starts - lengths).clamp(min=0)
    return _Packing(firsts, width) if 0 < firsts.max() <= width - keep else None


def _swapped_decoder(model: nn.Module, backend: str) -> Callable:
    before = type(model).forward.__get__(model)
    run = run_layers if _kernels(_device(model.layers[0]), backend) == "gpu" else _run_layers

    def forward(
        input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, use_cache=None,
        cache=None, **kwargs,
    ):  # fmt: skip
        cache = past_key_values if cache is None else cache
        if type(cache) is not JacobiCache or input_ids is None or position_ids is None or kwargs:
            return before(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                inputs_embeds=inputs_embeds, use_cache=use_cache, **{CACHE_NAME: cache}, **kwargs,
            )  # fmt: skip
        hidden = run(
            model, input_ids, cache, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        )
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_NAME: cache})

    if run is _run_layers:
        forward.run = run
    return forward


def window_logits(model: nn.Module, input_ids: torch.Tensor, cache: JacobiCache, keep: int, **options) -> torch.Tensor | None:
    """The last ``keep`` logits of a model that :func:`keeps_last`; None where its decoder is not swapped or has hooks.

    A call of the model would make two objects around them and look for defaults, which takes as long as some layers of a
    small model.
    """
    decoder = model._modules["model"]
    run = getattr(decoder.__dict__.get("forward"), "run", None)
    if run is None or "forward" in model.__dict__ or _has_any_global_hook() or has_hooks(model) or has_hooks(decoder):
        return None
    return model.lm_head(run(decoder, input_ids, cache, **options)[:, -keep:])


def _run_layers(model: nn.Module, input_ids: torch.Tensor, cache: JacobiCache, **options) -> torch.Tensor:
    """All layers of a decoder, each swapped, and its norm, on the CPU: of the last layer what is asked for, and without
    the padding of prompts."""
    layers = list(model.layers)[: model.config.num_hidden_layers]
    (rows, width), last, norm, mask = input_ids.shape, layers[-1], model.norm, options["attention_mask"]
    keep, packing = cache.keep, None
    if keep is not None and (keep >= width or any(map(has_hooks, (model, last, norm)))):
        keep = None
    if keep is not None and not any(map(has_hooks, (model.embed_tokens, *layers))):
        packing = _packing(mask, width, keep)
    hidden = model.embed_tokens(input_ids if packing is None else packing.pack(input_ids))
    held = _held_layers(layers, hidden, cache, rows)
    if packing is not None and held is None:
        hidden, packing = model.embed_tokens(input_ids), None
    angles = _angles(model.rotary_emb, hidden, cache, options["position_ids"], packing)
    if held is None:
        options |= {"position_embeddings": angles, CACHE_NAME: cache}
        for layer in layers[:-1]:
            hidden = layer(hidden, **options)
        hidden = last(hidden, keep=keep, **options)
    else:
        lengths, starts, branch = from_mask(mask)
        if packing is not None:
            lengths = torch.maximum(lengths, starts)
        cos, sin = _of_rows(angles, hidden.shape[0])
        hidden = held(hidden, cos, sin, lengths, starts, branch, keep, None if packing is None else packing.counts)
    if not (is_known(norm, last.input_layernorm, hidden) and last.forward.takes(hidden, cache)):
        return norm(hidden)
    return rms_norm(hidden, norm._parameters["weight"], norm.variance_epsilon, "cpp")


def _held_layers(layers: list[nn.Module], hidden: torch.Tensor, cache: JacobiCache, rows: int) -> DecoderLayers | None:
    """All layers of a model, each swapped, as one; None where they have to be called one by one.

    They are made once a decode, so weights that are replaced while it runs are in use from the next one on.
    """
    if any(map(has_hooks, layers)) or not layers[0].forward.takes(hidden, cache):
        return None
    if torch.compiler.is_compiling() or watched(hidden):
        return None
    if cache.decoder is None and resolve(cache.backend, hidden.device) == "cpp":
        weights = [layer.forward.run.weights() for layer in layers]
        dim, buffers = layers[0].self_attn.head_dim, []
        for layer, of_layer in zip(layers, weights, strict=True):
            shape = rows, of_layer.key.shape[0] // dim, dim
            buffers.append(cache.room(layer.self_attn.layer_idx, shape, shape, hidden.dtype, hidden.device))
        with contextlib.suppress(ValueError):  # the ops can do with more, or say what is wrong
            cache.decoder = DecoderLayers(weights, buffers, dim)
    return cache.decoder


def _angles(
    rotary: nn.Module, hidden: torch.Tensor, cache: JacobiCache, positions: torch.Tensor, packing: _Packing | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the rotary embedding of a decoder gives for positions ``[B, n]``, without their padding if that is left out."""
    if packing is not None:
        positions = packing.pack(positions.expand(packing.shape))
    fixed = getattr(rotary, "rope_type", None) in _FIXED_ANGLES and "forward" not in rotary.__dict__
    if not fixed or has_hooks(rotary):
        return rotary(hidden, position_ids=positions)
    if cache.angles is None:
        cache.angles = rotary(hidden, position_ids=torch.arange(cache.capacity)[None])
    shape = *positions.shape, -1
    return tuple(table[0].index_select(0, positions.flatten()).view(shape) for table in cache.angles)


def _linear_reason(module: nn.Linear, backend: str) -> str | None:
    """Why a linear layer is left alone, or None."""
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__qualname__}"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if (replaced := _replaced(nn.Linear)) is not None:
        return replaced
    return _parameters_reason(module, backend, ("cpp",))


def _parameters_reason(module: nn.Module, backend: str, kernels: tuple[str, ...]) -> str | None:
    if not isinstance(module._parameters.get("weight"), torch.Tensor):
        return "its weight is no parameter"  # but made in each call, by torch.nn.utils.prune for one
    dtype = module.weight.dtype
    for name, tensor in module._parameters.items():
        if tensor is None:
            continue
        if type(tensor) is not nn.Parameter:
            return f"its {name} is a {type(tensor).__qualname__}"
        own = _kernels(tensor.device, backend)
        if tensor.dtype not in (FLOAT_DTYPES if own == "gpu" else DTYPES) or tensor.dtype != dtype:
            return f"its {name} is in {tensor.dtype}"
        if tensor.layout != torch.strided or tensor.stride(-1) != 1:
            return f"its {name} is not contiguous"
        if own not in kernels:
            return f"its {name} is on {tensor.device} and the backend is {backend!r}; there torch runs it"
    return None


def keeps_last(model: nn.Module) -> bool:
    """Whether the logits of the last positions are known to need the last layer's output at these alone."""
    return _family(model, "ForCausalLM") is not None and _replaced(type(model)) is None


def _family(module: nn.Module, kind: str = "DecoderLayer") -> str | None:
    """The family whose decoder layer, or module of another kind, this is, itself and not a subclass."""
    name = type(module).__name__.removesuffix(kind)
    source = f"transformers.models.{name.lower()}.modeling_{name.lower()}"
    return name if name in _FAMILIES and type(module).__module__ == source else None


def _is_decoder(module: nn.Module) -> bool:
    """Whether this is a known model without its head, as its class has it."""
    return (
        _family(module, "Model") is not None
        and "forward" not in module.__dict__
        and set(module._modules) == {"embed_tokens", "layers", "norm", "rotary_emb"}
        and _family(module.rotary_emb, "RotaryEmbedding") == _family(module, "Model")
        and _replaced(type(module)) is _replaced(type(module.rotary_emb)) is None
    )


def _layer_reason(layer: nn.Module, backend: str) -> str | None:
    """Why a decoder layer is left alone, or None."""
    family = _family(layer)
    if family is None:
        return f"{type(layer).__qualname__} is none of the known decoder layers"
    source = type(layer).__module__
    heads = {"q_norm", "k_norm"} if family == "Qwen3" else set()
    classes = {
        "": "DecoderLayer",
        "self_attn": "Attention",
        "mlp": "MLP",
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), "RMSNorm"),
        **dict.fromkeys((f"self_attn.{name}" for name in heads), "RMSNorm"),
    }
    projections = {f"self_attn.{name}_proj" for name in "qkvo"}
    projections |= {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    modules = dict(layer.named_modules())
    if set(modules) != {*classes, *projections, "mlp.act_fn"}:
        return "it has other submodules than its class is known for"
    for name, module in modules.items():
        if name and has_hooks(module):  # its own run anyway
            return f"{name} has hooks"
        if "forward" in module.__dict__:
            return f"the forward of {name or 'the layer'} was replaced"
        if (replaced := _replaced(type(module))) is not None:
            return replaced
        if name in classes and (type(module).__module__, type(module).__name__) != (source, family + classes[name]):
            return f"{name} is a {type(module).__qualname__}"
        if name in projections and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__qualname__}"
        has_weight = module._parameters or hasattr(module, "weight")
        if has_weight and (reason := _parameters_reason(module, backend, ("cpp", "gpu"))):
            return f"{name}: {reason}"
    if len({(parameter.dtype, parameter.device) for parameter in layer.parameters()}) > 1:
        return "its parameters are of several dtypes or on several devices"
    if _kernels(_device(layer), backend) == "gpu" and (missing := backends.available()["triton"]):
        return f"what stands between its linear layers is in Triton, and {missing}"
    if any(modules[f"mlp.{name}_proj"].bias is not None for name in ("gate", "up", "down")):
        return "its MLP has biases"
    if type(modules["mlp.act_fn"]) not in (nn.SiLU, type(ACT2FN["silu"])):
        return f"its activation is {type(modules['mlp.act_fn']).__qualname__}"
    return None
