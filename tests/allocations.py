"""Counts the bytes of tensors that live while code runs: a measure of memory that is the same in every run."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Context in which the storages of new tensors are counted. peak: bytes of those that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        """Run an operation, and count the storages of its results that none of its arguments has."""
        result = function(*arguments, **(options or {}))
        known = {
            one.untyped_storage()._cdata for one in tree_leaves((arguments, options)) if isinstance(one, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self._storages:
                    self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        self._storages[place] = size
        self._live += size
        self.peak = max(self.peak, self._live)
        # The storage's object lives as long as some tensor uses it.
        weakref.finalize(storage, self._remove, place)

    def _remove(self, place: int) -> None:
        self._live -= self._storages.pop(place)
