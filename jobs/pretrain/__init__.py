"""`hasten pretrain`."""
