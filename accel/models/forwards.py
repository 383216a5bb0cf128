"""Forwards of a block that can wait in the middle of it, for weights that are not in this process or for statistics."""

from collections.abc import Callable

from greenlet import getcurrent, greenlet
from torch import Tensor


class Forward(greenlet):
    """One forward of a block. layer: number of the layer whose weight it waits for, None if it waits for none.

    output: what the function returned, once it has. collects: whether inputs of experts are collected from it now.
    """

    def __init__(self, function: Callable[[], Tensor | None]) -> None:
        super().__init__()
        self._function: Callable[[], Tensor | None] | None = function
        self.layer: int | None = None
        self.output: Tensor | None = None
        self.collects = True

    def run(self) -> None:
        """Body of the greenlet."""
        assert self._function is not None
        function, self._function = self._function, None
        self.output = function()

    def pause(self) -> None:
        """Return to whoever resumed this forward, until it is resumed again."""
        assert self.parent is not None
        self.parent.switch()


def in_forward() -> bool:
    """Whether a forward is running."""
    return isinstance(getcurrent(), Forward)


def current_forward() -> Forward:
    """The forward that is running."""
    current = getcurrent()
    if not isinstance(current, Forward):
        raise RuntimeError("a divided block only runs in run_forwards, which brings the weights")
    return current
