"""Speculative decoding: targets, drafters, verifiers, and the engine that loops over them."""
