"""Checkpoints with fewer heads of keys and values."""
