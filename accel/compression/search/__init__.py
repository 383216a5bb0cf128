"""Searches over levels: genomes in, measured candidates out. One file a search."""
