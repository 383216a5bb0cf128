"""Levels, which are ways to store a layer, and the database of all layers at all levels."""
