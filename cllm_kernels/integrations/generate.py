"""``model.generate(..., decoding="jacobi")``, ``JacobiGenerator`` and ``jacobi_generate``: one callable, three doors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation import EosTokenCriteria, GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from ..backends import resolve
from ..decoding import Decoded, JacobiCache, JacobiConfig, JacobiStatistics, decode
from ..ops import JacobiState
from .attention import as_mask, block_attention_enabled
from .optimize import optimize as optimized

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYER_TYPES = {"full_attention", "sliding_attention"}

# Options of generate that would change what comes out, with the values under which they do not.
_ALLOWED = {
    "do_sample": (None, False),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None,),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "token_healing": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "use_cache": (None, True),
}
# Arguments of generate that never reach a custom_generate callable, so they are looked at before.
_REFUSED_ARGUMENTS = (
    "assistant_model",
    "assistant_tokenizer",
    "custom_generate",
    "inputs_embeds",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "past_key_values",
    "prefix_allowed_tokens_fn",
    "stop_strings",
    "synced_gpus",
    "tokenizer",
)


@dataclasses.dataclass
class JacobiOutput(GenerateDecoderOnlyOutput):
    """What generate returns under ``return_dict_in_generate=True``.

    Attributes:
        sequences: int64 ``[B, P + N]``, prompt and new tokens, padded behind each row's EOS.
        statistics: counts and times of the run.
        trajectory: see :class:`cllm_kernels.decoding.Decoded`; None unless recorded.
    """

    statistics: JacobiStatistics | None = None
    trajectory: list | None = None


def jacobi_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    block_size: int = JacobiConfig.block_size,
    mode: str = JacobiConfig.mode,
    draft: str = JacobiConfig.draft,
    seed: int = JacobiConfig.seed,
    backend: str = JacobiConfig.backend,
    record_trajectory: bool = JacobiConfig.record_trajectory,
    optimize: bool = JacobiConfig.optimize,
    text_streamer: BaseStreamer | None = None,
    on_commit: Callable[[list[int]], None] | None = None,
    **model_kwargs,
) -> JacobiOutput | torch.Tensor:
    """Greedy Jacobi decoding as a ``custom_generate`` callable of transformers.

    ``model.generate(**inputs, custom_generate=jacobi_generate, block_size=16)`` works on any causal LM that
    honours the attention and cache interfaces of transformers, without a patch. The options are those of
    :class:`cllm_kernels.JacobiConfig`. transformers keeps generate's ``streamer`` from such callables: pass
    it as ``text_streamer`` here (:class:`JacobiGenerator` and ``decoding="jacobi"`` take ``streamer``).
    ``on_commit`` is called after every iteration with the tokens that it committed. Both take one sequence.

    Returns:
        int64 ``[B, P + N]``, or :class:`JacobiOutput` where ``return_dict_in_generate`` is set. In fp32 the
        tokens are those of ``generate(do_sample=False)``.

    Raises:
        ValueError: the prompt, an option or the logits are not what they must be.
        NotImplementedError: the model or an option of generate is not supported.
        Whatever is raised, the model is left as it was.
    """
    config = JacobiConfig(block_size, mode, draft, seed, backend, record_trajectory, optimize)
    _check_model(model)
    _check_options(generation_config, logits_processor, stopping_criteria)
    pads = _check_inputs(input_ids, model_kwargs)
    max_new_tokens = generation_config.max_length - input_ids.shape[1]
    max_position = _check_lengths(model, input_ids, pads, max_new_tokens, config)
    if (text_streamer or on_commit) is not None and input_ids.shape[0] > 1:
        raise ValueError(f"streamer and on_commit take one sequence; this batch has {input_ids.shape[0]} rows")
    chosen = resolve(config.backend, model.device)

    eos = generation_config.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    with contextlib.ExitStack() as stack:
        if text_streamer is not None:
            text_streamer.put(input_ids.cpu())
            stack.callback(text_streamer.end)
            on_commit = functools.partial(_stream, text_streamer, on_commit)
        stack.enter_context(_evaluation_mode(model))
        stack.enter_context(block_attention_enabled(model, chosen))
        if config.optimize:
            stack.enter_context(optimized(model, chosen))
        stack.enter_context(torch.inference_mode())
        decoded = _decode(
            model,
            input_ids.to(model.device),
            pads,
            eos,
            max_new_tokens,
            config,
            chosen,
            max_position,
            on_commit,
        )

    pad = generation_config.pad_token_id
    if pad is None:
        pad = eos[0] if eos else 0
    width = max(map(len, decoded.tokens))
    new = torch.tensor([row + [pad] * (width - len(row)) for row in decoded.tokens], device=input_ids.device)
    sequences = torch.cat((input_ids, new), dim=1)
    if not generation_config.return_dict_in_generate:
        return sequences
    return JacobiOutput(sequences=sequences, statistics=decoded.statistics, trajectory=decoded.trajectory)


class JacobiGenerator:
    """Jacobi decoding for a causal LM of transformers.

    Example::

        generator = JacobiGenerator(model, JacobiConfig(block_size=16))
        sequences = generator.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=128)
        print(generator.statistics.tokens_per_forward)

    Args:
        model: any causal LM that honours the attention and cache interfaces. It is not changed.
        config: options.

    Attributes:
        statistics: of the last call of :meth:`generate`; None before it.
        trajectory: of the last call, where the configuration records it.
    """

    def __init__(self, model: PreTrainedModel, config: JacobiConfig | None = None):
        _check_model(model)
        self.model = model
        self.config = config or JacobiConfig()
        self.statistics: JacobiStatistics | None = None
        self.trajectory: list | None = None

    def generate(self, inputs: torch.Tensor | None = None, **kwargs) -> JacobiOutput | torch.Tensor:
        """Takes what ``model.generate`` takes, greedy, and returns what it returns.

        Fields of :class:`JacobiConfig` given here override the configuration for this call. Raises as
        :func:`jacobi_generate` does.
        """
        names = [field.name for field in dataclasses.fields(JacobiConfig)]
        config = dataclasses.replace(self.config, **{name: kwargs.pop(name) for name in names if name in kwargs})
        for name in _REFUSED_ARGUMENTS:
            if kwargs.pop(name, None) is not None:
                raise NotImplementedError(f"generate's {name} is not supported by Jacobi decoding")
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        shape = tuple(prompt.shape) if isinstance(prompt, torch.Tensor) else None
        if shape is None or len(shape) != 2 or 0 in shape:
            raise ValueError(f"the prompt has shape {shape}; it must be a tensor [batch, length] with at least one token a row")
        if kwargs.get("attention_mask") is not None:
            _check_mask_shape(kwargs["attention_mask"], prompt)  # generate drops a mask of ones, whatever its shape
        returns_dict = kwargs.pop("return_dict_in_generate", None)
        given = kwargs.get("generation_config") or self.model.generation_config
        output = type(self.model).generate(
            self.model,
            inputs,
            return_dict_in_generate=True,
            custom_generate=functools.partial(
                jacobi_generate, **dataclasses.asdict(config),
                text_streamer=kwargs.pop("streamer", None),
                on_commit=kwargs.pop("on_commit", None),
            ),
            **kwargs,
        )
        self.statistics, self.trajectory = output.statistics, output.trajectory
        if returns_dict is None:
            returns_dict = given.return_dict_in_generate
        return output if returns_dict else output.sequences


class _Generate:
    """The callable that stands in for ``model.generate``; an object, so that it survives pickle and deepcopy."""

    def __init__(self, model: PreTrainedModel, config: JacobiConfig):
        self.generator = JacobiGenerator(model, config)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(functools.partial(type(self.generator.model).generate, self.generator.model))

    def __call__(self, inputs: torch.Tensor | None = None, *args, decoding: str | None = None, **kwargs):
        if decoding in (None, "ar"):
            return type(self.generator.model).generate(self.generator.model, inputs, *args, **kwargs)
        if decoding != "jacobi":
            raise ValueError(f"decoding is {decoding!r}; it must be 'jacobi', 'ar' or None")
        names = list(inspect.signature(type(self.generator.model).generate).parameters)[2:]
        return self.generator.generate(inputs, **dict(zip(names, args, strict=False)), **kwargs)


def enable_jacobi(
    model: PreTrainedModel, config: JacobiConfig | None = None, optimize: bool | None = None
) -> PreTrainedModel:
    """Lets ``model.generate`` take ``decoding="jacobi"`` and the options of :class:`JacobiConfig`.

    ``decoding="ar"`` or none is the untouched generate. Only this instance changes; :func:`disable_jacobi`
    undoes it. ``model.generate.generator.statistics`` holds the statistics of the last Jacobi call. ``optimize``
    overrides the option of that name in ``config``.

    Returns:
        The same model.
    """
    config = config or JacobiConfig()
    model.generate = _Generate(model, config if optimize is None else dataclasses.replace(config, optimize=optimize))
    return model


def disable_jacobi(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes :func:`enable_jacobi`; does nothing to a model that was not enabled. Returns the same model."""
    if isinstance(model.__dict__.get("generate"), _Generate):
        del model.generate
    return model


def _check_model(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        raise TypeError(f"the model is a {name}; Jacobi decoding takes a causal LM of transformers")
    if model.config.is_encoder_decoder:
        raise NotImplementedError(f"{name} is an encoder-decoder model; Jacobi decoding takes decoder-only causal LMs")
    if model.dtype not in _DTYPES:
        raise ValueError(f"the model is in {model.dtype}; Jacobi decoding takes {', '.join(map(str, _DTYPES))}")
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise NotImplementedError(f"the model is spread over {len(devices)} devices; Jacobi decoding takes one")
    text = model.config.get_text_config(decoder=True)
    others = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if others or not getattr(DynamicCache(config=text), "is_croppable", True):
        detail = f" (layer types {', '.join(sorted(others))})" if others else ""
        raise NotImplementedError(f"the cache of {name} cannot roll back{detail}, which Jacobi decoding needs")


def _check_options(
    generation_config: GenerationConfig | None,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList | None,
) -> None:
    if generation_config is None:
        raise ValueError("call this through generate(custom_generate=jacobi_generate), which prepares the generation config")
    for name, allowed in _ALLOWED.items():
        value = getattr(generation_config, name, None)
        if value not in allowed:
            raise NotImplementedError(f"generate's {name}={value!r} is not supported by Jacobi decoding; pass {name}={allowed[-1]!r}")
    if logits_processor:
        names = ", ".join(type(processor).__name__ for processor in logits_processor)
        raise NotImplementedError(f"logits processors are not supported by Jacobi decoding yet: {names}")
    others = [
        type(criterion).__name__
        for criterion in stopping_criteria or ()
        if not isinstance(criterion, (MaxLengthCriteria, EosTokenCriteria))
    ]
    if others:
        raise NotImplementedError(f"stopping criteria other than length and EOS are not supported yet: {', '.join(others)}")


def _check_inputs(input_ids: torch.Tensor, model_kwargs: dict) -> torch.Tensor:
    """Checks what generate prepared; returns the padding tokens of each row, int32 ``[B]``."""
    rows, width = input_ids.shape
    if rows == 0 or width == 0:
        raise ValueError(f"the prompt has shape {tuple(input_ids.shape)}; every row needs at least one token")
    mask = model_kwargs.pop("attention_mask", None)
    positions = model_kwargs.pop("position_ids", None)
    cache = model_kwargs.pop("past_key_values", None)
    for name in ("use_cache", "logits_to_keep"):
        model_kwargs.pop(name, None)
    others = [name for name, value in model_kwargs.items() if value is not None]
    if others:
        raise NotImplementedError(f"model inputs that Jacobi decoding does not support: {', '.join(sorted(others))}")
    if cache is not None and cache.get_seq_length() > 0:
        raise NotImplementedError("Jacobi decoding starts from an empty cache; past_key_values is not supported")
    if mask is None:
        mask = torch.ones_like(input_ids)
    _check_mask_shape(mask, input_ids)
    seen = mask.to(input_ids.device).bool()
    if bool((seen != seen.cummax(1).values).any()) or not bool(seen[:, -1].all()):
        raise ValueError("attention_mask must be zeros, then ones, in every row: batches are padded on the left, no row is empty")
    pads = (width - seen.sum(1)).to(torch.int32)
    if positions is not None:
        expected = torch.arange(width, device=input_ids.device) - pads[:, None]
        if positions.shape[-1] != width or bool(((positions != expected) & seen).any()):
            raise NotImplementedError("position_ids other than a row's own 0, 1, 2, ... are not supported by Jacobi decoding")
    return pads


def _check_mask_shape(mask: torch.Tensor, input_ids: torch.Tensor) -> None:
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; it must be {tuple(input_ids.shape)}, as input_ids is")


def _check_lengths(
    model: PreTrainedModel, input_ids: torch.Tensor, pads: torch.Tensor, max_new_tokens: int, config: JacobiConfig
) -> int | None:
    """Checks that everything fits the model's positions; returns the highest position id, None for no limit."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None:
        return None
    longest = input_ids.shape[1] - int(pads.min())
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} need {longest + max_new_tokens} "
            f"positions; the model has {limit}"
        )
    if config.block_size > limit:
        raise ValueError(f"block_size is {config.block_size}; the model's cache holds at most {limit} positions")
    return limit - 1


def _decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    pads: torch.Tensor,
    eos: list[int],
    max_new_tokens: int,
    config: JacobiConfig,
    backend: str,
    max_position: int | None,
    on_commit: Callable[[list[int]], None] | None,
) -> Decoded:
    rows, width = input_ids.shape
    device = input_ids.device
    bounds = torch.zeros(2, rows, dtype=torch.int32, device=device)
    bounds[1] = pads
    state = JacobiState.create(
        prompt=input_ids,
        starts=pads,
        limits=max_new_tokens,
        block_size=config.block_size,
        eos=eos,
        seeds=torch.arange(rows) * 2**32 + config.seed,
        refill=config.draft,
    )
    bounds[0] = state.lengths
    state = dataclasses.replace(state, lengths=bounds[0])
    cache = JacobiCache(bounds[0], width - 1 + max_new_tokens + config.block_size, backend)
    mask = as_mask(bounds)
    keeps = model._supports_logits_to_keep()

    def forward(tokens: torch.Tensor, positions: torch.Tensor, keep: int) -> torch.Tensor:
        options = {"logits_to_keep": keep} if keeps and tokens.shape[1] > keep else {}
        outputs = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        return outputs.logits[:, -keep:]

    return decode(forward, state, input_ids, bounds, config, backend, max_position, on_commit)


def _stream(streamer: BaseStreamer, on_commit: Callable[[list[int]], None] | None, tokens: list[int]) -> None:
    # One token a call, as generate does: streamers may count the calls.
    for token in tokens:
        streamer.put(torch.tensor([token]))
    if on_commit is not None:
        on_commit(tokens)


@contextlib.contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
