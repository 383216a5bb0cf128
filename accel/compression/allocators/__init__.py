"""One budget of bits, many layers: which level each of them gets. One file a method."""
