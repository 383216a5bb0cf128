"""Products of few float32 rows by a weight in bfloat16."""
