"""`hasten calibrate_cache`."""
