"""Methods that drop tokens from a cache."""
