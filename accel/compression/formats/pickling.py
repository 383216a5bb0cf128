"""Lets tensors of FP8 be pickled, as workers hand on packed weights: importing this module registers it.

torch 2.13 pickles tensors of its newer dtypes with an untyped storage, and cannot load that again (`UntypedStorage` has
no attribute `dtype`). torch.save is not concerned.
"""

import copyreg
from typing import Any

import numpy as np
import torch


def _reduce(storage: torch.UntypedStorage) -> tuple[Any, ...]:
    return _restored, (torch.empty(0, dtype=torch.uint8).set_(storage).numpy(),)


def _restored(data: np.ndarray) -> torch.TypedStorage:
    # Ray's arrays are read-only. Tensors are rebuilt from a typed storage, whatever its dtype.
    storage = torch.from_numpy(data.copy()).untyped_storage()
    return torch.TypedStorage(wrap_storage=storage, dtype=torch.uint8, _internal=True)


copyreg.pickle(torch.UntypedStorage, _reduce)
