"""Training data of draft heads: what the target said and computed, recorded once and read many times."""
