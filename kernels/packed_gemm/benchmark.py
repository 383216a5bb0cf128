"""Benchmark cases of products with packed weights."""

from collections.abc import Iterator

import torch

from hasten.kernels.timing import Case, Skipped


def cases(device: torch.device, dry: bool) -> Iterator[Case | Skipped]:
    """None yet."""
    yield Skipped("packed_gemm", "there is only a reference")
