"""`hasten decode`."""
