"""When things happened: stamps on this rank's clock, and how that clock relates to rank 0's.

All times are integer nanoseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from seqpar import Transport

_ROUNDS = 8
_STAMPS_OF_AN_ANCHOR = 1024
_PAUSE_NS = 1_000_000_000


class Clock(Protocol):
    """Takes stamps, and later says when they were; `enter` and `leave` bracket what has a name."""

    def stamp(self) -> Any: ...

    def nanoseconds(self, stamp: Any) -> int:
        """On this process's monotonic clock."""
        ...

    def enter(self, name: str) -> None: ...

    def leave(self) -> None: ...


class HostClock:
    """Where the work is done when a call returns: on a CPU."""

    def stamp(self) -> int:
        return time.perf_counter_ns()

    def nanoseconds(self, stamp: int) -> int:
        return stamp

    def enter(self, name: str) -> None:
        return None

    def leave(self) -> None:
        return None


class CudaClock:
    """Stamps are events of the device's current stream: a kernel returns before it has run.

    Names become NVTX ranges, which Nsight shows.  Elapsed times come as float32 milliseconds,
    too coarse over minutes: so they are counted from the last of many anchors, and these from
    each other, in the order of the stream.  A pause makes one too: nothing may come for minutes.
    """

    def __init__(self, device: torch.device):
        torch.cuda.synchronize(device)
        first = _event()
        first.synchronize()
        self._anchors, self._anchors_at = [first], [time.perf_counter_ns()]
        self._taken, self._stamped = 0, self._anchors_at[0]

    def stamp(self) -> tuple[int, torch.cuda.Event]:
        event, now = _event(), time.perf_counter_ns()
        self._taken += 1
        if self._taken % _STAMPS_OF_AN_ANCHOR == 0 or now - self._stamped > _PAUSE_NS:
            self._anchors.append(event)
        self._stamped = now
        return len(self._anchors) - 1, event

    def nanoseconds(self, stamp: tuple[int, torch.cuda.Event]) -> int:
        number, event = stamp
        for known in range(len(self._anchors_at), number + 1):
            self._anchors_at.append(self._after(known - 1, self._anchors[known]))
        return self._after(number, event)

    def _after(self, anchor: int, event: torch.cuda.Event) -> int:
        event.synchronize()
        milliseconds = self._anchors[anchor].elapsed_time(event)
        return self._anchors_at[anchor] + round(milliseconds * 1e6)

    def enter(self, name: str) -> None:
        torch.cuda.nvtx.range_push(name)

    def leave(self) -> None:
        torch.cuda.nvtx.range_pop()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def clock_of(device: torch.device) -> Clock:
    """The clock that tells how long the work on a device takes."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def clock_offset(
    asked: Sequence[int], answered: Sequence[int], first_asked: Sequence[int], first: Sequence[int]
) -> int:
    """How far a clock is ahead of rank 0's, from exchanges in which both told when they `asked`.

    Nobody knows what a rank asked before it asked: so rank 0 had its answer (`first`) after this
    rank asked, and this rank `answered` after rank 0 asked (`first_asked`).  Between those bounds
    lies the truth; clocks that may be the same, as on one machine, are taken as the same.
    """
    least = max(a - b for a, b in zip(asked, first, strict=True))
    most = min(a - b for a, b in zip(answered, first_asked, strict=True))
    return 0 if least <= 0 <= most else (least + most) // 2


def measure_offset(
    transport: Transport, now: Callable[[], int] = time.perf_counter_ns
) -> tuple[int, int]:
    """(when, offset): on this rank's clock, and how far that is ahead of rank 0's.

    A few small exchanges of all ranks, which are not counted.
    """
    times = torch.zeros(2, _ROUNDS, dtype=torch.int64)
    with transport.uncounted():
        for round_ in range(_ROUNDS):
            times[0, round_] = now()
            _gathered(transport, times[0, round_])
            times[1, round_] = now()
        first = _gathered(transport, times)[0]
    return now(), clock_offset(*times.tolist(), *first.tolist())


def _gathered(transport: Transport, mine: torch.Tensor) -> torch.Tensor:
    mine = mine.to(transport.device)
    everyone = mine.new_empty(transport.world_size, *mine.shape)
    transport.all_gather(mine, everyone).wait()
    return everyone.cpu()


@dataclass(frozen=True, slots=True)
class Alignment:
    """Two measurements of a clock's offset, between which it drifts evenly: (when, offset)."""

    begin: tuple[int, int]
    end: tuple[int, int]

    def on_rank_0(self, at: int) -> int:
        """A time of this rank's clock on rank 0's."""
        (start, offset), (stop, last) = self.begin, self.end
        return at - offset - (last - offset) * (at - start) // max(1, stop - start)
