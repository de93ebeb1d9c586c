"""Jacobi decoding: configuration, cache, loop, statistics."""

from .cache import JacobiCache
from .config import JacobiConfig
from .loop import Decoded, Forward, decode
from .processing import Processing, Stopping, is_stateful
from .statistics import JacobiStatistics, RowStatistics

__all__ = [
    "Decoded",
    "Forward",
    "JacobiCache",
    "JacobiConfig",
    "JacobiStatistics",
    "Processing",
    "RowStatistics",
    "Stopping",
    "decode",
    "is_stateful",
]
