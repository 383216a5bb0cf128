"""One op per file: torch reference, kernel in Triton or C, one dispatch function."""
