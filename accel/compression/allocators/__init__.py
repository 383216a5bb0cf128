"""Allocators, which choose the levels of all layers within one budget of bits. One file a method."""
