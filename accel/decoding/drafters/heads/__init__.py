"""Drafters with a head that was trained for the target or the draft model."""
