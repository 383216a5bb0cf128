"""Methods that hold all tokens, and read for each query only those that matter to it."""
