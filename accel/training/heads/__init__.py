"""Heads: small networks on the hidden states of a model that help a drafter; beside each network, its training."""
