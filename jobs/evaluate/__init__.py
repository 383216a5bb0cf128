"""`hasten evaluate`."""
