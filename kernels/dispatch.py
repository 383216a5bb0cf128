"""Chooses between a kernel and its torch reference; no other module does."""

import os
from collections.abc import Collection

import torch
from torch import Tensor

# Triton's default is about to change; with fused multiply and add, kernels are faster and round once less. Read when
# triton is imported, which is later.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def use_triton(tensor: Tensor) -> bool:
    """Whether ops on this tensor run as Triton kernels: on a GPU, or anywhere in Triton's interpreter."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def use_c(tensor: Tensor, dtypes: Collection[torch.dtype] = (torch.float32,)) -> bool:
    """Whether ops on this tensor run as compiled C, if there is a compiler. dtypes: that the C code reads."""
    return tensor.device.type == "cpu" and tensor.dtype in dtypes
