"""Faults that happen at a named point of an actor's work, such as its second call, and not at a moment."""

import inspect
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from hasten.cluster.runtime import recovery


@dataclass(frozen=True)
class Die:
    """The process is killed, the first one that comes to it. mark: a file that tells the others."""

    mark: Path

    def __call__(self) -> None:
        """SIGKILL."""
        try:
            self.mark.touch(exist_ok=False)
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Hang:
    """Every process on a node hangs. mark: a file that tells that one does."""

    node_id: str
    mark: Path

    def __call__(self) -> None:
        """For ever."""
        if ray.get_runtime_context().get_node_id() == self.node_id:
            self.mark.touch()
            threading.Event().wait()


def failing(actor: type, method: str, count: int, fault: Callable[[], None]) -> type:
    """An actor's class with a fault before its Nth call of a method; of one that streams, before its Nth item."""
    original = getattr(actor, method)

    def step(self: Any) -> None:
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == count:
            fault()

    def call(self: Any, *arguments: Any) -> Any:
        step(self)
        return original(self, *arguments)

    def stream(self: Any, *arguments: Any) -> Any:
        for item in original(self, *arguments):
            step(self)
            yield item

    return type(actor.__name__, (actor,), {method: stream if inspect.isgeneratorfunction(original) else call})


@pytest.fixture
def no_stragglers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is re-executed because it is late: a loss cannot be overtaken, and is always met."""
    monkeypatch.setattr(recovery, "_STRAGGLER_SECONDS", float("inf"))
