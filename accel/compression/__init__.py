"""Compression of checkpoints: calibration, quantizers, pruners, levels, allocators, searches, and stored formats."""
