"""Commands besides the jobs, one per file with a function `main(words)`; `hasten --help` shows its first sentence."""
