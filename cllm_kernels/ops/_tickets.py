"""Counters in which the blocks of a CUDA launch find out which of them is the last."""

from __future__ import annotations

import torch

from .. import backends

# By device, stream, and capture of a graph. Launches of a stream follow one another, and each leaves its counters at 0.
_COUNTERS: dict[tuple[int, int, int], torch.Tensor] = {}
_FEWEST = 1024


def tickets(device: torch.device, count: int) -> int:
    """The address of at least `count` int32 that are 0 when the next launch on the current stream begins.

    Each capture of a graph gets its own, which the graph itself sets to 0, so that graphs may run beside each other.
    """
    index, stream = backends.cuda_stream(device)
    capture = backends.CUDA.capture_id(index, stream)
    counters = _COUNTERS.get((index, stream, capture))
    if counters is None or counters.numel() < count:
        for key in [key for key in _COUNTERS if key[:2] == (index, stream) and key[2] not in (0, capture)]:
            del _COUNTERS[key]  # of a capture that has ended: the graph keeps the memory
        counters = torch.zeros(max(count, _FEWEST), dtype=torch.int32, device=device)
        _COUNTERS[index, stream, capture] = counters
    return counters.data_ptr()
