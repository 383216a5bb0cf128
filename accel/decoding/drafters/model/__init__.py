"""Drafters with a small model of the target's tokenizer."""
