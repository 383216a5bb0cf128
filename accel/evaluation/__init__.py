"""How good a checkpoint is, how large, and how far it is from the original."""
