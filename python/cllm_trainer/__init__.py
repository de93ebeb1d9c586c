"""Minimal trainer for Consistency LLMs (Kou et al. 2024, arXiv 2403.00835): collect, train, evaluate."""
