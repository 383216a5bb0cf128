"""Segments whose keys and values lie in the host's memory: what a pass reads of them goes to the device."""

from dataclasses import dataclass

from torch import Tensor

from hasten.accel.cache.segments.base import partial_attention
from hasten.accel.cache.segments.dense import Dense
from hasten.accel.cache.segments.selected import Guided
from hasten.kernels.attention.contract import Partial, Scoring


def to_host(tensor: Tensor) -> Tensor:
    """A tensor in memory that the device copies from without waiting; itself where there is no accelerator."""
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor.cpu()


@dataclass(frozen=True)
class Offloaded(Guided):
    """keys, values: in the host's memory, see to_host. All else, and what is read, is where the positions are."""

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """All keys and values, on the device."""
        return self._on_device(self.keys), self._on_device(self.values), self.positions

    def _read(self, index: Tensor) -> Dense:
        """Only these tokens are copied."""
        places = index.to(self.keys.device)
        keys, values = (
            self._on_device(part.gather(1, places[..., None].expand(-1, -1, part.shape[2])))
            for part in (self.keys, self.values)
        )
        return Dense(keys, values, self.positions.gather(1, index))

    def _attend_seen(self, queries: Tensor, scoring: Scoring, seen: Tensor) -> Partial:
        """The tokens that any query of any head sees are copied."""
        read = seen.flatten(0, 1).any(0).nonzero()[:, 0]
        places = read.to(self.keys.device)
        keys, values = (self._on_device(part[:, places]) for part in (self.keys, self.values))
        return partial_attention(queries, keys, values, scoring, seen[..., read])

    def _on_device(self, part: Tensor) -> Tensor:
        return part.to(self.positions.device, non_blocking=True)
