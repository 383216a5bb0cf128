"""How a compressed checkpoint is written so that others can load it. One file a format."""
