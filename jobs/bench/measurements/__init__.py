"""What benchmarks compute with torch, transformers or Ray: a benchmark imports its part when it runs."""
