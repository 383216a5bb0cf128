"""`hasten search`."""
