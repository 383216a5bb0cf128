"""Benchmarks, a module each, run by `hasten bench NAME`; each writes its section of docs/benchmarks.md.

A benchmark's module holds its options and tables and imports quickly. Measurements that need torch, transformers or Ray
are in measurements/ and decoding/; processes/ runs jobs as processes.
"""
