"""``model.generate(..., decoding="jacobi")``, ``JacobiGenerator`` and ``jacobi_generate``: one callable, three doors."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    StopStringCriteria,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from ..backends import resolve
from ..decoding import (
    CACHE_NAME,
    Forward,
    JacobiCache,
    JacobiConfig,
    JacobiStatistics,
    LoneToken,
    Processing,
    Session,
    Stopping,
    decode,
    is_stateful,
)
from ..decoding.session import may_capture, runs_on_device, waits_for_host
from ..ops import JacobiState
from ..ops.block_attention import cuda_refusal
from .attention import as_mask, attention_kind, block_attention_enabled, dense_mask, submodules
from .optimize import keeps_last, optimized, window_logits
from .swaps import Swaps, outside

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYER_TYPES = {"full_attention", "sliding_attention"}

# Options of generate that would change what comes out, with the values under which they do not.
_ALLOWED = {
    "num_beams": (None, 1),
    "penalty_alpha": (None,),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "token_healing": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
# The loop itself does what these do.
_OWN_CRITERIA = (MaxLengthCriteria, EosTokenCriteria)
# Arguments of generate that never reach a custom_generate callable, so they are looked at before.
_REFUSED_ARGUMENTS = (
    "assistant_model",
    "assistant_tokenizer",
    "cache",
    "custom_generate",
    "inputs_embeds",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "past_key_values",
    "synced_gpus",
)


@dataclasses.dataclass
class JacobiOutput(GenerateDecoderOnlyOutput):
    """What generate returns under ``return_dict_in_generate=True``.

    Attributes:
        sequences: int64 ``[B, P + N]``, prompt and new tokens, padded behind each row's EOS.
        scores, logits: a float32 ``[B, V]`` for each new token, processed and as the model gave them, where
            ``output_scores`` and ``output_logits`` ask for them; zeros for rows that have ended.
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
    candidates: int = JacobiConfig.candidates,
    blocks: int = JacobiConfig.blocks,
    adaptive: bool = JacobiConfig.adaptive,
    seed: int | tuple[int, ...] | None = JacobiConfig.seed,
    cuda_graph: bool | None = JacobiConfig.cuda_graph,
    backend: str = JacobiConfig.backend,
    record_trajectory: bool = JacobiConfig.record_trajectory,
    optimize: bool = JacobiConfig.optimize,
    max_batch_size: int | None = JacobiConfig.max_batch_size,
    generator: torch.Generator | None = None,
    text_streamer: BaseStreamer | None = None,
    on_commit: Callable[[list[int]], None] | None = None,
    compiled: Callable | None = None,
    memory: dict | None = None,
    **model_kwargs,
) -> JacobiOutput | torch.Tensor:
    """Jacobi decoding, greedy or sampled, as a ``custom_generate`` callable of transformers.

    ``model.generate(**inputs, custom_generate=jacobi_generate, block_size=16)`` works on any causal LM that
    honours the attention and cache interfaces of transformers, without a patch. The options are those of
    :class:`cllm_kernels.JacobiConfig`. transformers keeps generate's ``streamer`` from such callables: pass
    it as ``text_streamer`` here (:class:`JacobiGenerator` and ``decoding="jacobi"`` take ``streamer``).
    ``on_commit`` is called after every iteration with the tokens that it committed. Both take one sequence.
    ``compiled`` is called in the model's place: what ``torch.compile`` made of it. It runs windows, which have one shape;
    prompts, which have many, run as the model is, as in transformers' generate. Graphs of iterations hold it too, unless
    it has CUDA graphs of its own (mode="reduce-overhead"), of which a warning tells.

    ``do_sample=True`` draws each token with noise that its seed, its row and its place alone decide (see
    :func:`cllm_kernels.ops.converge_`), so that every window gives the tokens that one token at a time
    (``draft="none"``) gives; they are distributed as generate's, but are not the ones that generate draws. The seed is
    ``seed``, or drawn from ``generator``, or from torch's global generator.

    Logits processors must be functions of their two arguments; one that remembers its calls has to say so by an
    attribute ``stateful = True``, and is served by a window of one token. Stopping criteria are asked for every
    committed token. They, own processors, streamers and ``on_commit`` find the model as it was, in evaluation mode. Where no
    EOS token is set, rows that a criterion has ended are padded too.

    Returns:
        int64 ``[B, P + N]``, or :class:`JacobiOutput` where ``return_dict_in_generate`` is set. In fp32 the
        tokens are those of ``generate(do_sample=False)`` unless they are sampled.

    Raises:
        ValueError: the prompt, an option or the logits are not what they must be.
        NotImplementedError: the model or an option of generate is not supported.
        Whatever is raised, the model is left as it was.
    """
    config = JacobiConfig(
        block_size, mode, draft, candidates, blocks, adaptive, seed, cuda_graph, backend, record_trajectory, optimize,
        max_batch_size,
    )
    attention = _check_model(model, model_kwargs.get(CACHE_NAME))
    _check_options(model, generation_config, logits_processor or [])
    sampling = bool(generation_config.do_sample)
    pads = _check_inputs(input_ids, model_kwargs)
    _check_tokens(model, "the prompt", input_ids)
    max_new_tokens = generation_config.max_length - input_ids.shape[1]
    max_position = check_lengths(model, input_ids.shape[1] - int(pads.min()), max_new_tokens, config)
    if (text_streamer or on_commit) is not None and input_ids.shape[0] > 1:
        raise ValueError(f"streamer and on_commit take one sequence; this batch has {input_ids.shape[0]} rows")
    seeds = _row_seeds(config.seed, generator, sampling, input_ids.shape[0])
    # One backend for all ops: that of attention, which the dtype decides about.
    chosen = resolve(config.backend, model.device, cuda_refusal(model.dtype))
    if torch.is_autocast_enabled(model.device.type):  # whose casts of weights a graph would hold
        config = dataclasses.replace(config, cuda_graph=False)
    if is_stateful(logits_processor or []):
        config = dataclasses.replace(config, draft="none", candidates=1, blocks=1, adaptive=False)
    choices = None
    if config.adapts and memory is not None:
        choices = memory.setdefault(("choices", config.width, config.sources), {})
    lone = memory.setdefault(("lone",), LoneToken()) if memory is not None and config.looks_up else None
    returns_dict = bool(generation_config.return_dict_in_generate)
    keep_scores = returns_dict and bool(generation_config.output_scores)
    prompt = input_ids.to(model.device)
    swaps: list[Swaps] = []
    others = functools.partial(outside, swaps)
    criteria = [criterion for criterion in stopping_criteria or () if not isinstance(criterion, _OWN_CRITERIA)]
    options = dict(
        processing=Processing(logits_processor or [], prompt, sampling, keep_scores, others),
        choices=choices,
        lone=lone,
        stopping=Stopping(criteria, prompt, others) if criteria else None,
        keep_scores=keep_scores,
        keep_logits=returns_dict and bool(generation_config.output_logits),
    )

    most = min(config.max_batch_size or prompt.shape[0], prompt.shape[0])
    if most < prompt.shape[0]:
        _check_that_rows_may_move(most, **options)

    eos = generation_config.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    with contextlib.ExitStack() as stack:
        if text_streamer is not None:
            text_streamer.put(input_ids.cpu())
            stack.callback(text_streamer.end)
            on_commit = functools.partial(_stream, text_streamer, on_commit)
        if on_commit is not None:
            on_commit = others()(on_commit)
        stack.enter_context(_lock(model))
        stack.enter_context(_evaluation_mode(model))
        # "auto" stays with block_attention, which knows what was measured for its sizes.
        own = "auto" if config.backend == "auto" and chosen == "cuda" else chosen
        if attention == "block":
            swaps.append(stack.enter_context(block_attention_enabled(model, own)))
        if config.optimize and compiled is None:
            swaps.append(stack.enter_context(optimized(model, own)))
        stack.callback(torch.clear_autocast_cache)  # of casts that have no gradients
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.cuda.device_of(prompt))  # whose streams and graphs are used
        session = _session(
            model,
            prompt,
            pads,
            eos,
            max_new_tokens,
            seeds,
            config,
            chosen,
            max_position,
            options["processing"],
            memory,
            attention,
            compiled,
            most,
            stack,
        )
        decoded = decode(session, prompt, config, chosen, on_commit=on_commit, **options)

    pad = generation_config.pad_token_id
    if pad is None:
        pad = eos[0] if eos else 0
    width = max(map(len, decoded.tokens))
    new = torch.tensor([row + [pad] * (width - len(row)) for row in decoded.tokens], device=input_ids.device)
    sequences = torch.cat((input_ids, new), dim=1)
    if not returns_dict:
        return sequences
    return JacobiOutput(
        sequences=sequences,
        # out of inference mode, as generate's are
        scores=decoded.scores and tuple(scores.clone() for scores in decoded.scores),
        logits=decoded.logits and tuple(logits.clone() for logits in decoded.logits),
        statistics=dataclasses.replace(decoded.statistics, attention=attention),
        trajectory=decoded.trajectory,
    )


# A decode swaps parts of its model, and `verify` does, so that one thread at a time has it; callbacks may decode again.
_locks: weakref.WeakKeyDictionary[PreTrainedModel, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def _lock(model: PreTrainedModel) -> threading.RLock:
    with _locks_lock:
        return _locks.setdefault(model, threading.RLock())


class JacobiGenerator:
    """Jacobi decoding for a causal LM of transformers.

    Example::

        generator = JacobiGenerator(model, JacobiConfig(block_size=16))
        sequences = generator.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=128)
        print(generator.statistics.tokens_per_forward)

    Args:
        model: any causal LM that honours the attention and cache interfaces, also inside a PEFT model or compiled by
            ``torch.compile``. It is not changed.
        config: options.

    Attributes:
        statistics: of the last call of :meth:`generate`; None before it.
        trajectory: of the last call, where the configuration records it.
    """

    def __init__(self, model: PreTrainedModel, config: JacobiConfig | None = None):
        self.model = model
        self.causal_lm = _causal_lm(model)
        _check_model(self.causal_lm)
        self.config = config or JacobiConfig()
        self.statistics: JacobiStatistics | None = None
        self.trajectory: list | None = None
        self._memory: dict = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_memory": {}}  # graphs cannot be copied, and copies of the model learn for themselves

    def generate(self, inputs: torch.Tensor | None = None, **kwargs) -> JacobiOutput | torch.Tensor:
        """Takes what ``model.generate`` takes, and returns what it returns.

        Fields of :class:`JacobiConfig` given here override the configuration for this call; ``generator`` is that of
        :func:`jacobi_generate`. Raises as that does.
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
        tokenizer = kwargs.pop("tokenizer", None)
        given = kwargs.get("generation_config")
        sources = [kwargs.pop("stop_strings", None), *(c.stop_strings for c in (given, self.causal_lm.generation_config) if c)]
        stop_strings = next((strings for strings in sources if strings is not None), None)
        if stop_strings is not None:
            if tokenizer is None:
                raise ValueError("stop_strings need the model's tokenizer: pass it as tokenizer=")
            criterion = StopStringCriteria(tokenizer, stop_strings)
            kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criterion])
            if given is not None:
                kwargs["generation_config"] = _without_stop_strings(given)
        returns_dict = kwargs.pop("return_dict_in_generate", None)
        options = dict(
            generator=kwargs.pop("generator", None),
            text_streamer=kwargs.pop("streamer", None),
            on_commit=kwargs.pop("on_commit", None),
            compiled=self.model if hasattr(self.model, "_orig_mod") else None,
            memory=self._memory,
            **{name: getattr(config, name) for name in names},
        )

        with contextlib.ExitStack() as hidden:
            model = hidden.enter_context(stop_strings_hidden(self.causal_lm))

            # generate looks at the signature twice, which takes long with as many parameters as jacobi_generate has
            def call(*args, **model_kwargs):
                hidden.close()  # callbacks may call generate
                return jacobi_generate(*args, **model_kwargs, **options)

            output = type(model).generate(
                model, inputs, return_dict_in_generate=True, custom_generate=call, **kwargs
            )
        self.statistics, self.trajectory = output.statistics, output.trajectory
        if returns_dict is None:
            returns_dict = (given or model.generation_config).return_dict_in_generate
        return output if returns_dict else output.sequences


@contextlib.contextmanager
def stop_strings_hidden(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Takes the stop strings out of the model's own configuration inside the context.

    generate keeps the tokenizer from a custom_generate callable, and raises where it meets stop strings without one.
    """
    own = model.generation_config
    try:
        if own.stop_strings is not None:
            model.generation_config = _without_stop_strings(own)
        yield model
    finally:
        model.generation_config = own


def _without_stop_strings(config: GenerationConfig) -> GenerationConfig:
    config = copy.deepcopy(config)
    config.stop_strings = None
    return config


class _Generate:
    """The callable that stands in for ``model.generate``; an object, so that it survives pickle and deepcopy."""

    def __init__(self, model: PreTrainedModel, config: JacobiConfig):
        self.generator = JacobiGenerator(model, config)
        self.owner = _uncompiled(model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(functools.partial(type(self.owner).generate, self.owner))

    def __call__(self, inputs: torch.Tensor | None = None, *args, decoding: str | None = None, **kwargs):
        if decoding in (None, "ar"):
            return type(self.owner).generate(self.owner, inputs, *args, **kwargs)
        if decoding != "jacobi":
            raise ValueError(f"decoding is {decoding!r}; it must be 'jacobi', 'ar' or None")
        # a look at the signature takes longer than a small model's layer
        names = list(inspect.signature(type(self.generator.causal_lm).generate).parameters)[2:] if args else ()
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
    config = config if optimize is None else dataclasses.replace(config, optimize=optimize)
    _uncompiled(model).generate = _Generate(model, config)
    return model


def disable_jacobi(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes :func:`enable_jacobi`; does nothing to a model that was not enabled. Returns the same model."""
    owner = _uncompiled(model)
    if isinstance(owner.__dict__.get("generate"), _Generate):
        del owner.generate
    return model


def _uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    return getattr(model, "_orig_mod", model)


def _causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The model of transformers inside what ``torch.compile`` or PEFT made of it."""
    model = _uncompiled(model)
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model"):
        return model
    # PEFT puts its adapters into the layers of the base model; only learned prompts stay outside.
    if model.active_peft_config.is_prompt_learning:
        raise NotImplementedError(
            f"the prompts that {model.active_peft_config.peft_type.value} learned are not supported by Jacobi decoding; "
            "adapters inside the layers, such as LoRA, are"
        )
    return model.get_base_model()


def _check_model(model: PreTrainedModel, cache: DynamicCache | None = None) -> str:
    """Checks that a model can be decoded; returns with which attention, see :func:`attention_kind`.

    cache: of the model as it is, where generate has made one.
    """
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
    cache = cache if type(cache) is DynamicCache else DynamicCache(config=text)
    if others or not getattr(cache, "is_croppable", True):
        detail = f" (layer types {', '.join(sorted(others))})" if others else ""
        raise NotImplementedError(f"the cache of {name} cannot roll back{detail}, which Jacobi decoding needs")
    return attention_kind(model)


def _check_options(
    model: PreTrainedModel, generation_config: GenerationConfig | None, processors: LogitsProcessorList | list
) -> None:
    if generation_config is None:
        raise ValueError("call this through generate(custom_generate=jacobi_generate), which prepares the generation config")
    for name, allowed in _ALLOWED.items():
        value = getattr(generation_config, name, None)
        if value not in allowed:
            raise NotImplementedError(f"generate's {name}={value!r} is not supported by Jacobi decoding; pass {name}={allowed[-1]!r}")
    # Trainers leave use_cache=False in checkpoints; only a caller means it.
    if generation_config.use_cache is False and model.generation_config.use_cache is not False:
        raise NotImplementedError("generate's use_cache=False is not supported by Jacobi decoding; pass use_cache=True")
    if any(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in processors):
        raise NotImplementedError("generate's guidance_scale runs the model once more for every token, which Jacobi decoding does not")


def _row_seeds(
    seed: int | tuple[int, ...] | None, generator: torch.Generator | None, sampling: bool, rows: int
) -> torch.Tensor:
    """The Philox key of each row, int64 ``[B]``."""
    if generator is not None:
        if seed is not None:
            raise ValueError("both seed and generator are given; pass one of them")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator is a {type(generator).__name__}; it must be a torch.Generator")
    if isinstance(seed, tuple):
        if len(seed) != rows:
            raise ValueError(f"there are {len(seed)} seeds for {rows} rows; pass one for each, or a single one")
        return torch.tensor(seed)
    if seed is None:
        # Greedy decoding takes nothing from torch's generators: the seed then decides the first drafts only.
        draws = sampling or generator is not None
        device = generator.device if generator is not None else None
        seed = int(torch.randint(2**32, (), generator=generator, device=device)) if draws else 0
    return torch.arange(rows) * 2**32 + seed


def _check_inputs(input_ids: torch.Tensor, model_kwargs: dict) -> torch.Tensor:
    """Checks what generate prepared; returns the padding tokens of each row, int32 ``[B]``."""
    rows, width = input_ids.shape
    if rows == 0 or width == 0:
        raise ValueError(f"the prompt has shape {tuple(input_ids.shape)}; every row needs at least one token")
    mask = model_kwargs.pop("attention_mask", None)
    positions = model_kwargs.pop("position_ids", None)
    cache = model_kwargs.pop(CACHE_NAME, None)
    for name in ("use_cache", "logits_to_keep"):
        model_kwargs.pop(name, None)
    others = [name for name, value in model_kwargs.items() if value is not None]
    if others:
        raise NotImplementedError(f"model inputs that Jacobi decoding does not support: {', '.join(sorted(others))}")
    if cache is not None and cache.get_seq_length() > 0:
        raise NotImplementedError(f"Jacobi decoding starts from an empty cache; {CACHE_NAME} is not supported")
    if mask is None:
        mask = torch.ones_like(input_ids)
    _check_mask_shape(mask, input_ids)
    seen = mask.to(input_ids.device).bool()
    if not seen.all() and not (seen[:, -1].all() and (seen == seen.cummax(1).values).all()):
        raise ValueError("attention_mask must be zeros, then ones, in every row: batches are padded on the left, no row is empty")
    pads = (width - seen.sum(1)).to(torch.int32)
    if positions is not None:
        expected = torch.arange(width, device=input_ids.device) - pads[:, None]
        if positions.shape[-1] != width or bool(((positions != expected) & seen).any()):
            raise NotImplementedError("position_ids other than a row's own 0, 1, 2, ... are not supported by Jacobi decoding")
    return pads


def _check_tokens(model: PreTrainedModel, name: str, tokens: torch.Tensor) -> None:
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} is {tokens.dtype}; it must be int64 or int32")
    embeddings = model.get_input_embeddings()
    vocabulary = getattr(embeddings, "num_embeddings", None) or embeddings.weight.shape[0]
    least, largest = torch.stack(tokens.aminmax()).tolist()
    if least < 0 or largest >= vocabulary:
        value = least if least < 0 else largest
        raise ValueError(f"{name} holds token {value}; the model's are in [0, {vocabulary})")


def _check_mask_shape(mask: torch.Tensor, input_ids: torch.Tensor) -> None:
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; it must be {tuple(input_ids.shape)}, as input_ids is")


def check_lengths(model: PreTrainedModel, longest: int, max_new_tokens: int, config: JacobiConfig) -> int | None:
    """Checks that prompts of up to ``longest`` tokens, and what comes behind them, fit the model's positions; returns the
    highest position id, None for no limit."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None:
        return None
    short = _short_positions(model)
    if short is not None:
        if longest + max_new_tokens > short:
            raise NotImplementedError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} go beyond {short} positions, where the "
                "rotary embedding (longrope) gives all tokens other angles; Jacobi decoding does not follow that"
            )
        limit = min(limit, short)
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} need {longest + max_new_tokens} "
            f"positions; the model has {limit}"
        )
    if config.width > limit:
        raise ValueError(f"the window has {config.width} tokens; the model's cache holds at most {limit} positions")
    return limit - 1


def _short_positions(model: PreTrainedModel) -> int | None:
    """For how many positions the angles of longrope are those of short texts; None for other rotary embeddings."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") == "longrope":
            short = parameters.get("original_max_position_embeddings")
            return short or getattr(config, "original_max_position_embeddings", None)
    return None


def _check_that_rows_may_move(
    most: int, processing: Processing, stopping: Stopping | None, keep_scores: bool, keep_logits: bool, **others
) -> None:
    """Checks that nobody outside knows rows by their number, where only ``most`` are decoded at once."""
    given = {
        "logits processors that look at more than scores and lengths": not processing.vectorised,
        "stopping criteria besides EOS and length": stopping is not None,
        "output_scores and output_logits": keep_scores or keep_logits,
    }
    for what in (name for name, is_given in given.items() if is_given):
        raise NotImplementedError(
            f"max_batch_size={most} decodes fewer rows than the batch has, and rows that wait take the places of others; "
            f"{what} need all rows in place: pass max_batch_size=None"
        )


# On CUDA devices, shapes are rounded up to these, so that prompts of many lengths share a captured graph.
_PROMPT_STEP, _OUTPUT_STEP = 128, 128
# Graphs that a generator keeps with their caches, for batches of other sizes; the least recent goes first.
_KEPT_SESSIONS = 3


def _session(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    pads: torch.Tensor,
    eos: list[int],
    max_new_tokens: int,
    seeds: torch.Tensor,
    config: JacobiConfig,
    backend: str,
    max_position: int | None,
    processing: Processing,
    memory: dict | None,
    attention: str,
    compiled: Callable | None,
    most: int,
    stack: contextlib.ExitStack,
) -> Session:
    """Buffers for this prompt, out of `memory` where an earlier call left them; `stack` leaves them there again."""
    rows, width = input_ids.shape
    device = input_ids.device
    kept = memory is not None and may_capture(device, config) and not processing.processors
    output, extra = max_new_tokens, 0
    if kept:
        output = -(-max_new_tokens // _OUTPUT_STEP) * _OUTPUT_STEP
        extra = -width % _PROMPT_STEP
    state = JacobiState.create(
        prompt=torch.nn.functional.pad(input_ids, (extra, 0)),  # what drafts are drawn from does not change by it
        starts=pads + extra,
        limits=max_new_tokens,
        block_size=config.width,
        eos=eos,
        seeds=seeds,
        capacity=output,
        refill=config.refill,
    )
    key = None
    if kept:
        key = (
            "session", rows, most, width + extra, output, len(eos), config.width, config.candidates, config.mode,
            config.refill, processing.temperature, backend, max_position, attention, id(compiled), _fingerprint(model),
            config.optimize, waits_for_host(config) or most < rows,  # single iterations then
        )  # fmt: skip
        session = memory.pop(key, None)  # a decode inside a callback must not get it
        if session is not None:
            stack.callback(_keep, memory, key, session)
            session.restart(state, pads)
            return session
    bounds = torch.zeros(2, rows, dtype=torch.int32, device=device)
    bounds[1] = pads
    state.lengths.set_(bounds[0])  # not a new state, whose fields would be checked again
    capacity = width + extra - 1 + output + config.candidates * config.width
    forward, cache = window_forward(model, attention, bounds, capacity, backend, compiled)
    session = Session(forward, state, bounds, max_position, cache, most)
    if runs_on_device(device, config, processing) and _has_graphs_of_its_own(model, compiled):
        session.capturable = False
        warnings.warn(
            "the model is compiled with CUDA graphs of its own, which graphs of whole iterations cannot hold, so each "
            'iteration is launched by itself; torch.compile with mode="default" or "max-autotune-no-cudagraphs" avoids that',
            RuntimeWarning,
            stacklevel=2,
        )
    if kept:
        stack.callback(_keep, memory, key, session)
    return session


def _keep(memory: dict, key: tuple, session: Session) -> None:
    memory.pop(key, None)
    # Few, since each holds a cache.
    for old in [other for other in memory if other[0] == "session"][: 1 - _KEPT_SESSIONS]:
        del memory[old]
    memory[key] = session  # the latest


def _has_graphs_of_its_own(model: PreTrainedModel, compiled: Callable | None) -> bool:
    """Whether torch.compile was asked for CUDA graphs (modes reduce-overhead and max-autotune), also of a module inside."""
    calls = [compiled, *(getattr(module, "_compiled_call_impl", None) for module in model.modules())]
    configs = [call.get_compiler_config() for call in calls if hasattr(call, "get_compiler_config")]
    return any(config.get("triton.cudagraphs") for config in configs if config)


def _fingerprint(model: PreTrainedModel) -> int:
    """Of what a captured graph took from the model: where its weights lie, its code, what adapters and hooks were on."""
    weights = [part.data_ptr() for parameter in model.parameters() for part in _parts(parameter)]
    modules = [
        (id(module), id(type(module).forward), id(module.__dict__.get("forward")))
        + (len(module._forward_hooks), len(module._forward_pre_hooks))
        + tuple(
            str(value)
            for name in ("disable_adapters", "active_adapters", "merged_adapters")
            if (value := getattr(module, name, None)) is not None and not callable(value)  # models have methods of these names
        )
        for module in model.modules()
    ]
    return hash((tuple(weights), tuple(modules)))


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a quantised one is made of, itself where it is plain."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def window_forward(
    model: PreTrainedModel,
    attention: str,
    bounds: torch.Tensor,
    capacity: int,
    backend: str,
    compiled: Callable | None = None,
) -> tuple[Forward, JacobiCache]:
    """The forward of a model over windows behind a new cache, whose lengths are ``bounds[0]``, and that cache.

    With block attention, call it under ``block_attention_enabled``. compiled: is called with windows in the model's place.
    """
    native = attention == "native"
    cache = JacobiCache(bounds[0], capacity, backend, zeros=native)
    keeps, dtype = model._supports_logits_to_keep(), model.dtype
    trims = keeps and keeps_last(model)

    def forward(tokens: torch.Tensor, positions: torch.Tensor, keep: int, branch: int = 0) -> torch.Tensor:
        options = {"logits_to_keep": keep} if keeps and tokens.shape[1] > keep else {}
        rows = bounds[:, : tokens.shape[0]]
        cache.keep = keep if trims else None
        call = compiled if compiled is not None and tokens.shape[1] == keep else model
        mask = dense_mask(rows, tokens.shape[1], capacity, dtype, branch) if native else as_mask(rows, branch)
        inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
        if trims and call is model and (logits := window_logits(model, tokens, cache, keep, **inputs)) is not None:
            return logits
        return call(input_ids=tokens, **inputs, **{CACHE_NAME: cache}, **options).logits[:, -keep:]

    return forward, cache


def _stream(streamer: BaseStreamer, on_commit: Callable[[list[int]], None] | None, tokens: list[int]) -> None:
    # One token a call, as generate does: streamers may count the calls.
    for token in tokens:
        streamer.put(torch.tensor([token]))
    if on_commit is not None:
        on_commit(tokens)


@contextlib.contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in submodules(model) if module.training]
    try:
        if training:  # eval() walks all modules too
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True
