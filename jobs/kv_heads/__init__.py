"""`hasten kv_heads`."""
