"""Measurements of benchmarks that need torch, transformers or Ray; a benchmark imports them when it runs."""
