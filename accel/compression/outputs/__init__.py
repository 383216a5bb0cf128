"""Folders of compressed checkpoints, and what a checkpoint must be to be compressed."""
