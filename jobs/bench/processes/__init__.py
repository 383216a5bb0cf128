"""Jobs and peers that benchmarks run as processes of their own, and what those processes use."""
