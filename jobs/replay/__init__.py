"""`hasten replay`."""
