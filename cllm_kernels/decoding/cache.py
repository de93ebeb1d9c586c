"""A preallocated KV cache whose rollback is an integer."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..ops import append_kv_
from ..ops.decoder_layers import DecoderLayers

# The cache among a model's arguments and outputs. Transformers 5.24 gave it this name; the old one is to go in 5.40.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class JacobiCache(Cache):
    """K and V buffers of full length for every layer, sliding ones too, under one length per batch row.

    A forward writes its window behind the length and never moves it; the loop adds the accept length. What
    stands behind the length is overwritten by the next forward, so rejected drafts cost nothing.

    Args:
        lengths: int32 ``[B]``, valid rows of each batch row, on the model's device. Shared with the loop's state.
        capacity: rows of each buffer.
        backend: of ``append_kv_``.
        zeros: whether fresh buffers are zeros. Attention that adds a mask multiplies what it hides by 0, which must not
            be NaN; block attention does not read it.

    Attributes:
        keep: for how many of the last positions of the next forward its outputs are asked for; None for all.
        angles: cos and sin ``[1, capacity, D]`` of every position, where a model's rotary embedding is asked for them once.
        decoder: what runs all layers in one call, where a model's layers are such.
    """

    def __init__(self, lengths: torch.Tensor, capacity: int, backend: str = "auto", zeros: bool = False):
        super().__init__(layers=[])
        self.lengths = lengths
        self.capacity = capacity
        self.backend = backend
        self.zeros = zeros
        self.keep: int | None = None
        self.angles: tuple[torch.Tensor, torch.Tensor] | None = None
        self.decoder: DecoderLayers | None = None
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a window's ``[B, Hkv, n, D]`` keys and values; returns the whole ``[B, Hkv, S, D]`` buffers.

        With fewer rows than the first window had, these are the first rows of the buffers. Under autocast, keys that rotary
        embeddings made float32 again are held as values are, and as attention would round them.
        """
        if key_states.dtype != value_states.dtype and torch.is_autocast_enabled(key_states.device.type):
            dtype = torch.get_autocast_dtype(key_states.device.type)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        return self.append(key_states, value_states, layer_idx)

    def append(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
        query: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`update` of keys that are not rotated yet; cos, sin and query as ``append_kv_`` takes them."""
        shapes = [(*states.shape[:2], states.shape[3]) for states in (key_states, value_states)]
        buffers = self.room(layer_idx, *shapes, key_states.dtype, key_states.device)
        rows, lengths = key_states.shape[0], self.lengths
        if rows < lengths.shape[0]:
            lengths = lengths[:rows]
        if rows < buffers[0].shape[0]:
            buffers = tuple(buffer[:rows] for buffer in buffers)
        append_kv_(*buffers, key_states, value_states, lengths, cos, sin, query, self.backend)
        return buffers

    def room(
        self,
        layer_idx: int,
        keys: tuple[int, int, int],
        values: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's whole buffers, made for windows of keys and values with (B, Hkv, D) if there are none."""
        buffers = self._buffers.get(layer_idx)
        if buffers is None:
            fresh = torch.zeros if self.zeros else torch.empty
            buffers = self._buffers[layer_idx] = tuple(
                fresh(*shape[:2], self.capacity, shape[2], dtype=dtype, device=device) for shape in (keys, values)
            )
        return buffers

    def move_row(self, source: int, target: int) -> None:
        """Copies what row ``source`` holds over row ``target``."""
        length = int(self.lengths[source])
        for buffers in self._buffers.values():
            for buffer in buffers:
                buffer[target, :, :length] = buffer[source, :, :length]

    def take_branches(self, width: int, branches: list[int], counts: list[int]) -> None:
        """Moves what each row's branch wrote for its first ``counts[row]`` tokens to where one window alone writes it.

        width: rows of a branch; branches, counts: of the first rows.
        """
        for row, (branch, count, length) in enumerate(zip(branches, counts, self.lengths.tolist(), strict=False)):
            if branch == 0 or count < 2:  # the first token is that of every branch
                continue
            source = length + branch * width
            for buffers in self._buffers.values():
                for buffer in buffers:
                    buffer[row, :, length + 1 : length + count] = buffer[row, :, source + 1 : source + count]

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        """int32 ``[B]``: the valid rows. A tensor, since reading it would make the host wait."""
        return self.lengths

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.capacity, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.capacity

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.capacity

    def __len__(self) -> int:
        return len(self._buffers)
