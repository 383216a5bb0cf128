"""`hasten cache`."""
