"""Methods that spread a budget of tokens over layers or heads."""
