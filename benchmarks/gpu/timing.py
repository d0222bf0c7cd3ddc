"""How work on a device is timed, how long the whole may take, and what goes wrong on the way."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Row = dict[str, Any]
Work = Callable[[int], Any]

# several times the largest L2 of today's cards: inputs that rotate over as much come from memory
ROTATED_BYTES = 512 * 2**20


class Timer(Protocol):
    """`work(i)` runs on input set i of `inputs`; times are medians, in seconds of one call."""

    def seconds(self, work: Work, inputs: int = 1) -> float:
        """On the device, calls back to back: what launching costs the host is hidden."""
        ...

    def called(self, work: Work, inputs: int = 1) -> float:
        """One call at a time, its launch included: what a caller who waits for it sees."""
        ...

    def once(self, work: Callable[[], Any]) -> float:
        """One call without any before it, for what takes many seconds and is warm already."""
        ...


class EventTimer:
    """CUDA events around the work, after warm-up calls.

    Short calls are queued behind a kernel that only waits, until the host has launched all of
    them: otherwise the time between two launches would be taken for the kernel's.
    """

    def __init__(self, aim_s: float = 0.15, most: int = 20):
        self._aim_s, self._most = aim_s, most

    def seconds(self, work: Work, inputs: int = 1) -> float:
        work(0)  # compiles and loads
        one, host = self._one(work, 1 % inputs)
        if one > self._aim_s:
            return statistics.median([self._one(work, i % inputs)[0] for i in range(2)])
        calls = min(self._most, max(1, math.ceil(2e-3 / one)))
        samples = min(self._most, max(5, round(self._aim_s / (one * calls))))
        # bounded: if the call measured was the one that compiles, its host time says nothing
        waiting = min(0.05, host * calls) if one < 5e-3 else 0.0
        return statistics.median(
            [self._queued(work, inputs, i * calls, calls, waiting) for i in range(samples)]
        )

    def called(self, work: Work, inputs: int = 1) -> float:
        work(0)
        one, _ = self._one(work, 1 % inputs)
        samples = min(self._most, max(5, round(self._aim_s / one)))
        return statistics.median([self._one(work, i % inputs)[0] for i in range(samples)])

    def once(self, work: Callable[[], Any]) -> float:
        return self._one(lambda _: work(), 0)[0]

    def _one(self, work: Work, index: int) -> tuple[float, float]:
        """Seconds between events around one call, and those of the host in it."""
        torch.cuda.synchronize()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        started = time.perf_counter()
        work(index)
        host = time.perf_counter() - started
        after.record()
        torch.cuda.synchronize()
        return max(1e-7, before.elapsed_time(after) / 1e3), host

    def _queued(self, work: Work, inputs: int, first: int, calls: int, waiting_s: float) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if waiting_s:
            torch.cuda._sleep(round(3e9 * waiting_s))  # cycles: half as long again at 2 GHz
        before.record()
        for index in range(first, first + calls):
            work(index % inputs)
        after.record()
        torch.cuda.synchronize()
        return max(1e-7, before.elapsed_time(after) / 1e3 / calls)


class Budget:
    """The seconds that are left, for the whole run or for a part of it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._stop_at = clock() + seconds

    @property
    def left(self) -> float:
        return self._stop_at - self._clock()

    def part(self, seconds: float) -> Budget:
        """At most `seconds` of what is left."""
        return Budget(max(0.0, min(seconds, self.left)), self._clock)


@dataclass
class Section:
    """What one part of the run found: measured rows, what failed and why, what was left out."""

    name: str
    what: str
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    facts: Row = field(default_factory=dict)

    def attempt(self, cell: str, work: Callable[[], T]) -> T | None:
        """The result of `work`; None after a failure, whose reason is kept in one line."""
        try:
            return work()
        except DeviceLost:
            raise
        except Exception as error:
            self.failed.setdefault(reason(error), []).append(cell)
        # outside the handler: there the traceback still holds the tensors of the failed cell
        try:
            settle()
        except Exception as error:
            raise DeviceLost(self, cell, error) from error
        return None

    def out_of_time(self, budget: Budget, cell: str, need_s: float = 1.0) -> bool:
        """Whether `cell` has to be skipped, which is then noted."""
        late = budget.left < need_s
        if late:
            self.skipped.append(cell)
        return late


class Shares:
    """Keeps one back end that compiles for long from taking the time of all others."""

    def __init__(self, budget: Budget, most: float = 0.3):
        self._budget, self._limit = budget, most * budget.left
        self._spent: dict[str, float] = {}

    def take(self, name: str, work: Callable[[], T]) -> T:
        """The result of `work`, whose time is that of `name`."""
        before = self._budget.left
        try:
            return work()
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + before - self._budget.left

    def used_up(self, name: str, section: Section) -> bool:
        """Whether `name` has had its share, which is then noted."""
        over = self._spent.get(name, 0.0) > self._limit
        note = f"{name}: stopped after {self._spent.get(name, 0.0):.0f} s, its share of the time"
        if over and note not in section.skipped:
            section.skipped.append(note)
        return over


class DeviceLost(Exception):
    """The device answers no more: an error in a kernel has ended its context.

    `section` is what its part of the run had found until then.
    """

    def __init__(self, section: Section, cell: str, error: Exception):
        super().__init__(f"after {cell}: {reason(error)}")
        self.section = section


@dataclass(frozen=True)
class Bench:
    """What every section is given: where it runs, how it times, how long it may take.

    `copy` and `matmul` are the ceilings in bytes and floating point operations a second.
    """

    device: str
    timer: Timer
    budget: Budget
    copy: float = math.nan
    matmul: float = math.nan

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


def reason(error: BaseException) -> str:
    """One line of at most 120 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) <= 120 else text[:119] + "…"


def settle() -> None:
    """Give failed allocations back; raises if the device is gone with the failure."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def random(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Standard normal numbers: zeros would run faster than real data."""
    out = torch.empty(shape, device=device, dtype=dtype)
    for part in out.view(-1).split(2**28):
        part.normal_()
    return out


def sets_of(nbytes: int, limit: int = ROTATED_BYTES) -> int:
    """How many sets of inputs of `nbytes` to rotate over, so that no cache holds them."""
    return min(64, max(1, -(-limit // max(1, nbytes))))


def free_bytes(device: str) -> float:
    """Memory that can still be allocated; no limit off the GPU."""
    if torch.device(device).type != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖, in float64."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())
