"""Jacobi decoding: configuration, cache, loop, statistics."""

from .cache import JacobiCache
from .config import JacobiConfig
from .loop import Decoded, decode
from .statistics import JacobiStatistics, RowStatistics

__all__ = ["Decoded", "JacobiCache", "JacobiConfig", "JacobiStatistics", "RowStatistics", "decode"]
