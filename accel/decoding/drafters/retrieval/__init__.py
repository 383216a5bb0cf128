"""Drafters without a model: they look tokens up in the text, or in what the target said before."""
