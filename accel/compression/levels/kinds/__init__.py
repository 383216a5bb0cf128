"""Kinds of levels, one file a kind. Modules in this folder that define a Level are discovered automatically."""
