"""Loops over chunks: what brings a model under a budget of bytes."""
