"""`hasten train`."""
