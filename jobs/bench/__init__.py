"""Benchmarks, one per file, run by `hasten bench NAME`: each writes its own section of docs/benchmarks.md."""
