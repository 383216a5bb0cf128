"""Pruners: the weights of a linear layer in, the kept weights and their mask out. One file a method."""
