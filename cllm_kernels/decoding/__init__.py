"""Jacobi decoding: configuration, cache, loop, statistics."""

from .adaptive import AdaptiveChoice
from .cache import CACHE_NAME, JacobiCache
from .config import JacobiConfig
from .drafts import LoneToken
from .loop import Decoded, decode
from .processing import Processing, Stopping, is_stateful
from .session import Forward, Session
from .statistics import JacobiStatistics, RowStatistics

__all__ = [
    "CACHE_NAME",
    "AdaptiveChoice",
    "Decoded",
    "Forward",
    "JacobiCache",
    "JacobiConfig",
    "JacobiStatistics",
    "LoneToken",
    "Processing",
    "RowStatistics",
    "Session",
    "Stopping",
    "decode",
    "is_stateful",
]
