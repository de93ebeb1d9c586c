"""Fast Jacobi decoding for Hugging Face models."""

__version__ = "0.1.0"

_EXPORTS = {
    "Certificate": "integrations.verification",
    "JacobiConfig": "decoding",
    "JacobiGenerator": "integrations.generate",
    "JacobiOutput": "integrations.generate",
    "JacobiStatistics": "decoding",
    "disable_jacobi": "integrations.generate",
    "enable_jacobi": "integrations.generate",
    "jacobi_generate": "integrations.generate",
    "optimize": "integrations.optimize",
    "verify": "integrations.verification",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    # Lazy, so that the ops can be used without importing transformers.
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
