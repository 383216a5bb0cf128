"""Segments: the ways in which some tokens' keys and values are stored."""
