"""Every algorithm of hasten, as plain Python on torch and transformers."""
