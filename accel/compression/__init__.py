"""Smaller checkpoints: the calibration pass, quantizers and the formats they are written in."""
