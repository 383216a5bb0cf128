"""Stored forms of compressed weights, in checkpoints and in level databases. One file a format."""
