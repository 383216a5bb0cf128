"""`hasten levels`."""
