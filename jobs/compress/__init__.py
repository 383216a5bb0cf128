"""`hasten compress`."""
