"""Evaluation of checkpoints: perplexity, divergence from the original, task suites, and sizes."""
