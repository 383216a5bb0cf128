"""Where decoding runs as fused kernels: the one rule for all of them."""

import torch
from torch import Tensor

from hasten.kernels.dispatch import use_triton

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of attention: rows of larger heads do not fit the registers.
_MAX_HEAD_SIZE = 256


def runs_kernels(tensor: Tensor) -> bool:
    """Whether operations on this tensor are kernels: on a GPU, or anywhere in Triton's interpreter.

    Not in a CPU's bfloat16, which the interpreter computes wrongly.
    """
    return use_triton(tensor) and tensor.dtype in _DTYPES and (tensor.is_cuda or tensor.dtype != torch.bfloat16)


def attends_by_kernels(tensor: Tensor, head_size: int) -> bool:
    """Whether rotary embedding and attention of heads of this size are kernels, for tensors like this one."""
    return runs_kernels(tensor) and head_size % 2 == 0 and head_size <= _MAX_HEAD_SIZE
