"""What a CUDA graph does, on a CPU: operations are recorded with their tensors, and replayed on the same memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations whose results leave the device, or whose output shapes depend on values.
_SYNCHRONISING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::bincount",
}


class Tape(TorchDispatchMode):
    """Records operations while it is active; an operation that a CUDA graph cannot hold fails."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and record an operation."""
        assert func._schema.name not in _SYNCHRONISING, f"{func} in a recorded pass"
        outputs = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, outputs))
        return outputs

    def replay(self) -> None:
        """Run the operations again, with their results where they were."""
        for func, args, kwargs, outputs in self._calls:
            for old, new in zip(tree_leaves(outputs), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tape(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A Capture, see accel/decoding/targets/graphs.py."""
    recording = Tape()
    with recording:
        outputs = function()
    return recording.replay, outputs
