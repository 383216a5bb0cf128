"""Memory that a launcher allocates without writing it, filled with what no kernel computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it torch.empty and torch.empty_like return NaN, or the largest integer, so that gaps show."""
    empty, empty_like = torch.empty, torch.empty_like

    def filled(function: Any) -> Any:
        def allocate(*arguments: Any, **options: Any) -> Tensor:
            tensor: Tensor = function(*arguments, **options)
            if tensor.dtype.is_floating_point:
                return tensor.copy_(torch.full((), torch.nan))
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

        return allocate

    with patch("torch.empty", filled(empty)), patch("torch.empty_like", filled(empty_like)):
        yield
