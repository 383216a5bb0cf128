"""Codes back to weights."""
