"""Models that run many drafted tokens in one pass: any transformers causal LM, and a faster path for Llama's like."""
