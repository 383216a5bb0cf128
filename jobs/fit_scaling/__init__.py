"""`hasten fit_scaling`."""
