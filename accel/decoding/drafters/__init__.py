"""Drafters, one a file: each proposes a tree of tokens that may follow a sequence."""
