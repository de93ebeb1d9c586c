"""transformers: ``generate(decoding="jacobi")`` and the attention behind it."""
