"""The one place that chooses between a Triton kernel and its torch reference."""

import os

from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """Whether ops on this tensor run as Triton kernels: on a GPU, or anywhere in Triton's interpreter."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
