"""What ranks say to each other: asynchronous collectives, phases, and counters.

`Transport` counts and records; the two implementations (`process`, `threads`) only move
tensors.  A transport is passed as an argument everywhere and never looked up.
"""

from __future__ import annotations

import hashlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class TransportError(RuntimeError):
    """A peer is gone, late, or disagrees; `rank` saw it while in `phase`."""

    def __init__(self, rank: int, phase: str, what: str):
        super().__init__(f"rank {rank} during {phase}: {what}")
        self.rank, self.phase, self.what = rank, phase, what


class Handle(Protocol):
    """A collective under way; its tensors may be touched only after `wait`."""

    def wait(self) -> None: ...


@dataclass(slots=True)
class Counters:
    """Payload that this rank sent, in bytes, and calls made, by collective.

    `all_gather` and `broadcast` count one copy for each other rank, whatever tree or ring
    the library uses underneath, so that figures compare between transports.
    """

    bytes_sent: int = 0
    calls: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, sent: int) -> None:
        self.bytes_sent += sent
        self.calls[name] = self.calls.get(name, 0) + 1


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a rank did: `name`, at `at_s` on a monotonic clock, with details."""

    name: str
    at_s: float
    details: dict[str, Any]


class Transport(ABC):
    """One rank's end of a group of `world_size` ranks.

    Every rank of the group makes the same calls in the same order.  `events` is None unless
    somebody wants to see them; it then receives one `Event` for each post, wait and `mark`.
    """

    name: str

    def __init__(self, rank: int, world_size: int, device: torch.device, timeout_s: float):
        self.rank, self.world_size = rank, world_size
        self.device, self.timeout_s = device, timeout_s
        self.phase = "start"
        self.counters = Counters()
        self.events: list[Event] | None = None

    # -- collectives ---------------------------------------------------------------

    def shift(self, send: Sequence[Tensor], into: Sequence[Tensor], distance: int = 1) -> Handle:
        """Send to rank + distance and receive from rank − distance, both modulo the world.

        Either side may be empty where the plan says that nothing travels; tensors without
        elements are left out on both sides.
        """
        send, into = _solid(send), _contiguous(_solid(into))
        self._count("shift", _nbytes(send), received=_nbytes(into), distance=distance)
        to = (self.rank + distance) % self.world_size
        source = (self.rank - distance) % self.world_size
        return self._watched("shift", self._shift(send, to, into, source))

    def all_gather(self, tensor: Tensor, into: Tensor) -> Handle:
        """Gather equal `tensor`s into `into (world_size, *tensor.shape)`, in rank order."""
        _contiguous([into])
        self._count("all_gather", _nbytes([tensor]) * (self.world_size - 1))
        return self._watched("all_gather", self._all_gather(tensor.contiguous(), into))

    def all_to_all(self, send: Sequence[Tensor], into: Sequence[Tensor]) -> Handle:
        """Send `send[r]` to rank r and receive `into[r]` from it; sizes may differ by rank."""
        _contiguous(into)
        others = [tensor for rank, tensor in enumerate(send) if rank != self.rank]
        self._count("all_to_all", _nbytes(others))
        return self._watched("all_to_all", self._all_to_all(send, into))

    def broadcast(self, tensor: Tensor, root: int) -> Handle:
        """Overwrite `tensor` on every rank with that of `root`."""
        _contiguous([tensor])
        copies = self.world_size - 1 if self.rank == root else 0
        self._count("broadcast", _nbytes([tensor]) * copies)
        return self._watched("broadcast", self._broadcast(tensor, root))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is sent meanwhile is no part of the work: the counters are left as they were."""
        sent, calls = self.counters.bytes_sent, dict(self.counters.calls)
        yield
        self.counters.bytes_sent, self.counters.calls = sent, calls

    def check_agreement(self, what: str, *values: object) -> None:
        """Raise TransportError unless every rank passes the same `values`."""
        digest = hashlib.sha256(repr(values).encode()).digest()[:8]
        mine = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=self.device)
        everyone = mine.new_empty(self.world_size, 1)
        with self.uncounted():
            self.all_gather(mine, everyone).wait()
        *digests, own = [*everyone.flatten().tolist(), mine.item()]
        odd = [rank for rank, theirs in enumerate(digests) if theirs != own]
        if odd:
            raise TransportError(self.rank, self.phase, f"rank {odd[0]} was given another {what}")

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has come here."""

    @abstractmethod
    def subgroup(self, ranks: Sequence[int]) -> Transport:
        """The transport among `ranks` (this rank among them), numbered in that order."""

    # -- phases and events -----------------------------------------------------------

    def publish(self, phase: str) -> None:
        """Say what this rank is doing, for whoever has to name it after a fault."""
        self.phase = phase
        self._publish(phase)

    def check_running(self) -> None:
        """Raise if this rank is to stop: one that works long alone hears of it nowhere else."""
        return None

    @abstractmethod
    def phases(self) -> dict[int, str]:
        """The last phase that each rank published, as far as it has come."""

    def mark(self, name: str, **details: Any) -> None:
        """Record an event, if events are being recorded."""
        if self.events is not None:
            self.events.append(Event(name, time.perf_counter(), details))

    def close(self) -> None:
        """Release what the transport holds; the last call."""
        return None

    def abandon(self) -> None:
        """Let the other ranks notice that this one has failed."""
        return None

    # -- for implementations ---------------------------------------------------------

    @abstractmethod
    def _shift(self, send: list[Tensor], to: int, into: list[Tensor], source: int) -> Handle: ...
    @abstractmethod
    def _all_gather(self, tensor: Tensor, into: Tensor) -> Handle: ...
    @abstractmethod
    def _all_to_all(self, send: Sequence[Tensor], into: Sequence[Tensor]) -> Handle: ...
    @abstractmethod
    def _broadcast(self, tensor: Tensor, root: int) -> Handle: ...
    @abstractmethod
    def _publish(self, phase: str) -> None: ...

    def _count(self, name: str, sent: int, **details: Any) -> None:
        self.counters.add(name, sent)
        self.mark(f"post {name}", sent=sent, **details)

    def _watched(self, name: str, handle: Handle) -> Handle:
        return handle if self.events is None else _MarkedHandle(handle, self, name)


class _MarkedHandle:
    def __init__(self, handle: Handle, transport: Transport, name: str):
        self._handle, self._transport, self._name = handle, transport, name

    def wait(self) -> None:
        self._transport.mark(f"wait {self._name}")
        self._handle.wait()
        self._transport.mark(f"done {self._name}")


@contextmanager
def once_at_a_time(lock: threading.Lock) -> Iterator[None]:
    """Refuse a run inside or beside another one: their messages would be mixed up."""
    if not lock.acquire(blocking=False):
        raise RuntimeError("these ranks are running already: wait for that call to end")
    try:
        yield
    finally:
        lock.release()


class Done:
    """The handle of something that needed no waiting."""

    def wait(self) -> None:
        return None


def _solid(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.numel()]


def _contiguous(targets: Sequence[Tensor]) -> list[Tensor]:
    """The tensors to be received into: filled in place, so no copy may stand between."""
    for tensor in targets:
        if not tensor.is_contiguous():
            raise ValueError(
                f"cannot receive into shape {tuple(tensor.shape)} with strides {tensor.stride()}:"
                " it must be contiguous"
            )
    return list(targets)


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
