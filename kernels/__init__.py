"""One op per file: torch reference, Triton kernel, one dispatch function."""
