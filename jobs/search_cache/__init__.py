"""`hasten search_cache`."""
