"""Quantizers: the weights of a linear layer in, codes and scales out. One file a method."""
