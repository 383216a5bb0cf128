"""Verifiers, one a file: each decides which drafted tokens are kept, and draws the token after them."""
