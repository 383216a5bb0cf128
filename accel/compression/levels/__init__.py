"""Levels at which layers may be stored, and the database of all layers at all of them."""
