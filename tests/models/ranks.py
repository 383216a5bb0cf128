"""Ranks of a group as threads of this process, with an exchange that needs no process group."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from hasten.accel.models.exchange import Exchange

T = TypeVar("T")
_SECONDS = 60


class ThreadExchange(Exchange):
    """An exchange between threads. shared: a barrier for all ranks, and a list with a place for each."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, places: list[object]) -> None:
        super().__init__(rank, size)
        self._barrier, self._places = barrier, places
        self.gathered = 0

    def minimum(self, number: int) -> int:
        return min(self._all(number))

    def gather(self, part: Tensor) -> Tensor:
        self.gathered += 1
        return torch.cat(self._all(part))

    def _all(self, mine):
        self._places[self.rank] = mine
        self._barrier.wait(_SECONDS)
        values = list(self._places)
        self._barrier.wait(_SECONDS)
        return values


def on_ranks(size: int, work: Callable[[ThreadExchange], T]) -> list[T]:
    """Results of a function on each rank. An error of one rank ends the others' waits; the first one is raised."""
    barrier, places = threading.Barrier(size), [None] * size
    failed: list[BaseException] = []

    def run(rank: int) -> T | None:
        try:
            return work(ThreadExchange(rank, size, barrier, places))
        except BaseException as error:
            failed.append(error)
            barrier.abort()
            return None

    with ThreadPoolExecutor(size) as threads:
        results = list(threads.map(run, range(size)))
    if failed:
        raise failed[0]
    return results
