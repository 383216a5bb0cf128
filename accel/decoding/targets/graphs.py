"""Passes of fixed shapes, recorded once and replayed: on a GPU as CUDA graphs, one launch for all kernels of a pass.

Sizes of trees and lengths of caches are rounded up, so that few shapes occur. Inputs are copied into buffers whose
addresses the recording knows, and outputs are copied out of them, because the next replay overwrites them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hasten.accel.decoding.targets.tree_attention import TreeShape

# Sizes of trees, in nodes of a sequence, that are recorded; larger passes are long enough without.
TREE_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_MIN_LENGTH = 256
_WARM_UPS = 2


class MaskedInputs(NamedTuple):
    """Inputs of a pass over B adjacent slots that is a function of nothing else, all on the device.

    ids, positions, places: (B, N), places being the cache positions of the nodes. rows: (B, 1), the slots. allowed:
    (B, N, L) bool. key_positions: (B, 1, L), of the tokens in the slots' caches.
    """

    ids: Tensor
    positions: Tensor
    allowed: Tensor
    rows: Tensor
    places: Tensor
    key_positions: Tensor


class KernelInputs(NamedTuple):
    """The same of a pass whose attention is a kernel, over any slots.

    ids, positions: (B, N). packed: of `tree_attention.pack_tree`.
    """

    ids: Tensor
    positions: Tensor
    packed: Tensor


Inputs = MaskedInputs | KernelInputs
Outputs = tuple[Tensor, ...]
# Function of inputs, what else is fixed (the first slot of MaskedInputs, the TreeShape of KernelInputs), and the
# numbers of feature layers.
StaticPass = Callable[[Any, Any, tuple[int, ...]], Outputs]
# Records a function: returns what repeats it, and the outputs that every repetition writes to.
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], object], Outputs]]


def tree_size(nodes: int) -> int | None:
    """The size that a tree is padded to; None if it is too large to be recorded."""
    return next((size for size in TREE_SIZES if size >= nodes), None)


def cache_length(length: int, capacity: int) -> int:
    """Number of cache positions that a pass over `length` of them reads: a power of two, within the capacity."""
    return min(capacity, max(_MIN_LENGTH, 1 << (length - 1).bit_length()))


class RecordedPasses:
    """A StaticPass that is recorded once for all shapes of inputs."""

    def __init__(self, function: StaticPass, capture: Capture) -> None:
        self._function, self._capture = function, capture
        self._recorded: dict[tuple[object, ...], tuple[Inputs, Callable[[], object], Outputs]] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def clear(self) -> None:
        """Drop all recordings, because caches have other addresses."""
        self._recorded.clear()

    def __call__(self, inputs: Inputs, fixed: int | TreeShape, feature_layers: tuple[int, ...]) -> Outputs:
        """See StaticPass."""
        key = (fixed, feature_layers, *(tensor.shape for tensor in inputs))
        if key not in self._recorded:
            own = type(inputs)(*(tensor.clone() for tensor in inputs))
            self._recorded[key] = (own, *self._capture(lambda: self._function(own, fixed, feature_layers)))
        buffers, replay, outputs = self._recorded[key]
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        replay()
        return tuple(output.clone() for output in outputs)


class CudaGraphs:
    """Capture by CUDA graphs, which share their memory: outputs must be read before another of them is replayed."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        """See Capture. The function runs before, because libraries and kernels are initialised at their first call."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local, because other threads may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = function()
        self._pool = self._pool or graph.pool()
        return graph.replay, outputs
