"""Access to checkpoints: block by block, by family, and the embedded models."""
