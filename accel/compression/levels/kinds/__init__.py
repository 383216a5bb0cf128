"""Kinds of levels, one file a kind: every module here that defines a Level is found by itself."""
