"""Benchmarks, a module each, run by `hasten bench NAME`; each writes its section of docs/benchmarks.md.

A benchmark's module holds its options, its tables and nothing that takes long to import. What it measures with torch,
transformers or Ray is in measurements/ and decoding/, jobs that it runs as processes in processes/.
"""
