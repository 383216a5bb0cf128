"""Commands beside the jobs, one per file: each has `main(words)`, and its first sentence stands in `hasten --help`."""
