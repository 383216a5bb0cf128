"""`hasten train_drafter`."""
