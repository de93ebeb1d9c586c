"""Triton implementations of the ops, one file an op. Imported when a Triton backend is first used."""
