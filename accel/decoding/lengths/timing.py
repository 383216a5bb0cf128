"""Cost models: seconds of the target's passes, measured before decoding starts, and of drafting, fitted during it.

Target efficiency is that of MoESD (arXiv:2505.19645); draft sizes chosen by measured latency are in PPD
(arXiv:2405.18628).
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter, process_time

import torch

from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.tree import ROOT

# Number of timed passes at every size, and the seconds after which no further one is timed.
_REPEATS, _MAX_SECONDS = 5, 0.3
# Exponential decay of observations of drafting time: share of its weight that one loses with each later one.
_FADE = 0.02


class PassCosts:
    """Seconds of a pass, by its number of sequences and its width, the number of tokens of each sequence.

    measured: seconds by sequences and width. Between two measured widths the cost is interpolated; beyond the largest
    it is extrapolated along the last segment. It is interpolated between numbers of sequences as well, and beyond the
    largest it is proportional to them.
    """

    def __init__(self, measured: Mapping[int, Mapping[int, float]]) -> None:
        self.measured = {count: dict(sorted(by_width.items())) for count, by_width in sorted(measured.items())}
        # An adaptive length reads dozens of costs before every pass.
        self._cached: dict[tuple[int, int], float] = {}

    def seconds(self, width: int, sequences: int = 1) -> float:
        """Seconds of a pass over `width` tokens in each of `sequences` sequences."""
        seconds = self._cached.get((width, sequences))
        if seconds is None:
            seconds = self._cached[width, sequences] = self._interpolated(width, sequences)
        return seconds

    def _interpolated(self, width: int, sequences: int) -> float:
        counts = list(self.measured)
        index = min(bisect_left(counts, sequences), len(counts) - 1)
        high, low = counts[index], counts[max(0, index - 1)]
        if sequences >= high:
            return self._of_width(high, width) * sequences / high
        share = (sequences - low) / (high - low) if low < sequences else 0.0
        return (1 - share) * self._of_width(low, width) + share * self._of_width(high, width)

    def _of_width(self, count: int, width: int) -> float:
        by_width = self.measured[count]
        widths = list(by_width)
        index = min(bisect_left(widths, width), len(widths) - 1)
        if widths[index] == width or index == 0:
            seconds = by_width[widths[index]]
        else:
            low, high = widths[index - 1], widths[index]
            slope = (by_width[high] - by_width[low]) / (high - low)
            seconds = by_width[low] + slope * (width - low)
        return seconds

    def efficiency(self, width: int, sequences: int = 1) -> float:
        """Target efficiency: cost of a pass over one token a sequence, divided by that over `width` tokens."""
        return self.seconds(1, sequences) / self.seconds(width, sequences)


def clock(target: Target) -> Callable[[], float]:
    """The clock for timing passes: CPU time with one CPU thread, which ignores other processes; else wall time."""
    alone = target.device.type == "cpu" and torch.get_num_threads() == 1 and not target.waits_for_others
    return process_time if alone else perf_counter


def measure_costs(target: Target, widths: Sequence[int], sequences: int = 1, context: int = 128) -> PassCosts:
    """Measured costs of passes of these widths after `context` tokens, for 1 and for `sequences` sequences.

    Empties the target's caches. The fastest of several passes counts, because other load only slows a pass down.
    """
    widths = sorted({1, *(min(width, target.max_length - 1) for width in widths)})
    context = max(1, min(context, target.max_length - widths[-1]))
    target.reserve(sequences, context + widths[-1])
    for slot in range(sequences):
        target.prefill(slot, [0] * context)
    now = clock(target)
    measured: dict[int, dict[int, float]] = {}
    for count in sorted({1, sequences}):
        measured[count] = {}
        for width in widths:
            seconds = []
            for repeat in range(_REPEATS + 1):
                started = now()
                logits = target.forward(range(count), [[0] * width] * count, [range(ROOT, width - 1)] * count).logits
                float(logits[0, 0, 0])  # waits until the device is done
                seconds.append(now() - started)
                for slot in range(count):
                    target.commit(slot, [])
                if repeat and sum(seconds) > _MAX_SECONDS:
                    break
            measured[count][width] = min(seconds[1:])  # the first pass compiles
    return PassCosts(measured)


class DraftingTime:
    """Seconds of drafting as a linear function of the requested tokens, fitted to recent passes by least squares."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, nodes: float, seconds: float) -> None:
        """Add an observation: drafting `nodes` tokens took `seconds`."""
        fade = 1 - _FADE
        self._n, self._x, self._y = fade * self._n + 1, fade * self._x + nodes, fade * self._y + seconds
        self._xx, self._xy = fade * self._xx + nodes * nodes, fade * self._xy + nodes * seconds

    def seconds(self, nodes: float) -> float:
        """Expected seconds for `nodes` tokens; 0 before the first observation."""
        if not self._n:
            return 0.0
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x**2
        # If all observations have about the same size, the time is taken as proportional to the size.
        slope = (
            (self._xy / self._n - mean_x * mean_y) / spread if spread > 0.05 * mean_x**2 else mean_y / max(mean_x, 1)
        )
        slope = min(max(slope, 0.0), mean_y / max(mean_x, 1e-9))
        return max(0.0, mean_y + slope * (nodes - mean_x))
