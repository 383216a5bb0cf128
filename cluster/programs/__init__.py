"""What the driver does with actors: calibration, search, decoding, evaluation, points of a sweep."""
