"""One rank of a verifier whose target is divided over a process group.

Rank 0 is the verifier: the engine runs in it, with the drafter and all requests. The other ranks repeat the calls of
its target, which it broadcasts.
"""

import weakref
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from hasten.accel.decoding.targets.base import Target
from hasten.accel.decoding.targets.divided import Call, DividedTarget, LeadingTarget
from hasten.cluster.actors.divided_model import load_part
from hasten.cluster.actors.verifier import DecodeSpec, VerifierActor
from hasten.cluster.runtime.process_group import Rank

# Between two requests, ranks wait for this long without an error; a loss ends the group at once.
_IDLE = timedelta(days=365)
_USAGE = "usage"


class RankVerifier(VerifierActor, Rank):
    """A verifier on rank 0, and on the other ranks the parts of its targets; all ranks of a group are made equally."""

    def __init__(self, spec: DecodeSpec, client: str) -> None:
        super().__init__(spec, client)
        assert spec.division is not None
        self._division = spec.division
        # Number of targets so far, and those that exist no longer, of which the other ranks have not been told.
        self._count, self._dropped = 0, list[int]()
        self._control: Any = None

    def join(self, rank: int, device: str, *places: tuple[int, str]) -> None:
        """See Rank. Calls are broadcast through main memory, also between GPUs."""
        super().join(rank, device, *places)
        self._control = torch.distributed.new_group(backend="gloo", timeout=_IDLE)

    def follow(self) -> None:
        """Repeat the calls of rank 0's targets; ends with the group only."""
        targets: dict[int, DividedTarget] = {}
        while True:
            dropped, number, calls = self._receive()
            for old in dropped:
                del targets[old]
            if calls == _USAGE:
                torch.distributed.gather_object(super().usage(), None, dst=0, group=self._control)
            elif number in targets:
                targets[number].repeat(calls)
            else:
                targets[number] = DividedTarget(*load_part(self._spec.target, self._division, calls, self._spec.device))

    def _receive(self) -> Any:
        """The next message of rank 0, see _send."""
        message: list[Any] = [None]
        torch.distributed.broadcast_object_list(message, src=0, group=self._control)
        return message[0]

    def usage(self) -> dict[str, float]:
        """Sum of the ranks' CPU seconds since their targets were loaded, and the largest of their peak memories."""
        usages = [super().usage()] * self.size
        if self.rank == 0 and self.size > 1:
            self._send(0, _USAGE)
            torch.distributed.gather_object(super().usage(), usages, dst=0, group=self._control)
        return {
            "cpu_seconds": sum(usage["cpu_seconds"] for usage in usages),
            "peak_rss_bytes": max(usage["peak_rss_bytes"] for usage in usages),
        }

    def _load(self, dtype: torch.dtype) -> Target:
        self._count += 1
        number = self._count
        self._send(number, dtype)
        model, whole = load_part(self._spec.target, self._division, dtype, self._spec.device)
        target = LeadingTarget(model, partial(self._send, number), whole)
        weakref.finalize(target, self._dropped.append, number).atexit = False
        return target

    def _send(self, number: int, calls: Sequence[Call] | torch.dtype | str) -> None:
        """Send calls of a target to the other ranks; a dtype loads it, with a new number."""
        dropped = self._dropped.copy()
        self._dropped.clear()
        torch.distributed.broadcast_object_list([(dropped, number, calls)], src=0, group=self._control)
