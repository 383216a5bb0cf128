"""Rounding of activations: the inputs of layers, and keys and values in the cache."""
