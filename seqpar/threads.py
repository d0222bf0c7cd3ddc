"""Simulated ranks: N threads of one process run the same per-rank code.

Tensors are copied when sent, so that aliasing cannot hide a fault; an exception in one rank
ends all of them with that exception.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from seqpar.cores import usable_cores
from seqpar.transport import Handle, Transport, TransportError, _nbytes, once_at_a_time

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Link:
    """A model of the wire that leaves each rank: delivery is delayed accordingly."""

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")


@dataclass(slots=True)
class _Message:
    tensors: list[Tensor]
    ready_at: float


class ThreadWorld:
    """What N simulated ranks share: the mail under way, the first failure, the phases."""

    def __init__(
        self,
        world_size: int,
        *,
        device: torch.device | str = "cpu",
        timeout_s: float = 600.0,
        threads_per_rank: int | None = None,
        link: Link | None = None,
    ):
        self.world_size, self.timeout_s = world_size, timeout_s
        self.threads_per_rank = threads_per_rank or max(1, usable_cores() // world_size)
        self.device = _numbered(torch.device(device))
        self.link = link or Link()
        self.failure: BaseException | None = None
        self.phases: dict[int, str] = {}
        self.restarts = 0
        self._running = threading.Lock()
        self._workers: list[threading.Thread] = []
        self._mail: dict[tuple, _Message] = {}
        self._changed = threading.Condition()
        self._link_free_at = [0.0] * world_size
        self.transports = [
            ThreadTransport(self, rank, tuple(range(world_size))) for rank in range(world_size)
        ]

    def run(self, rank_fn: Callable[[Transport], T]) -> list[T]:
        """Run `rank_fn(transport)` on every rank; returns the results in rank order.

        The first exception of any rank ends the others at their next exchange and is raised
        here, with a note that names the rank and its phase.
        """
        with once_at_a_time(self._running):
            self._start_afresh()
            results: list = [None] * self.world_size
            self._workers = [
                threading.Thread(
                    target=self._rank_main,
                    args=(rank, rank_fn, results),
                    name=f"rank {rank}",
                    daemon=True,
                )
                for rank in range(self.world_size)
            ]
            self._work()
            # threads to come start with what the last thread set, and are not all ours
            torch.set_num_threads(torch.get_num_threads())
            if self.failure is not None:
                raise self.failure
            return results

    def _rank_main(self, rank: int, rank_fn: Callable[[Transport], T], results: list) -> None:
        transport = self.transports[rank]
        try:
            torch.set_num_threads(self.threads_per_rank)
            with torch.inference_mode():
                results[rank] = rank_fn(transport)
        except BaseException as error:
            if not isinstance(error, _Ended):
                error.add_note(f"rank {rank}, during {transport.phase}")
                self.abort(error)

    def _work(self) -> None:
        try:
            for worker in self._workers:
                worker.start()
            for worker in self._workers:
                while worker.is_alive():
                    worker.join(0.2)  # a bare join would hold back Ctrl-C
        except BaseException as error:
            self.abort(error)
            give_up_at = time.monotonic() + 5.0
            for worker in self._workers:
                if worker.is_alive():  # or it was not started
                    worker.join(max(0.0, give_up_at - time.monotonic()))
            raise

    def _start_afresh(self) -> None:
        """Forget what a failed run left under way; no rank of it may still be at work."""
        busy = [worker.name for worker in self._workers if worker.is_alive()]
        if busy:
            raise RuntimeError(f"{busy[0]} of an interrupted run is still computing: try again")
        if self.failure is not None:
            self.failure = None
            self.restarts += 1
            self._mail.clear()

    def abort(self, error: BaseException) -> None:
        """End every rank at its next exchange; the first error is the one that counts."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def send(self, source: int, key: tuple, tensors: Sequence[Tensor]) -> None:
        copies = [tensor.detach().clone() for tensor in tensors]
        with self._changed:
            if self.failure is not None:
                raise _Ended
            starts_at = max(time.perf_counter(), self._link_free_at[source])
            sent_at = starts_at + _nbytes(copies) / self.link.bytes_per_s
            self._link_free_at[source] = sent_at
            self._mail[key] = _Message(copies, sent_at + self.link.latency_s)
            self._changed.notify_all()

    def receive(self, key: tuple, rank: int) -> list[Tensor]:
        give_up_at = time.perf_counter() + self.timeout_s
        with self._changed:
            while True:
                if self.failure is not None:
                    raise _Ended
                now = time.perf_counter()
                message = self._mail.get(key)
                if message is not None and message.ready_at <= now:
                    del self._mail[key]
                    return message.tensors
                if now >= give_up_at:
                    raise TransportError(
                        rank,
                        self.phases.get(rank, "start"),
                        f"nothing came from rank {key[1]} (in phase"
                        f" {self.phases.get(key[1], 'start')}) for {self.timeout_s:g} s",
                    )
                until = give_up_at if message is None else message.ready_at
                self._changed.wait(min(until - now, 0.5))


def _numbered(device: torch.device) -> torch.device:
    """`cuda` as models say where they are: with the number of the card."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class _Ended(Exception):
    """This rank stops because another one failed."""


class _Receipt:
    """Takes the awaited messages and copies them to where they were asked for."""

    def __init__(self, world: ThreadWorld, rank: int, awaited: list[tuple[tuple, list[Tensor]]]):
        self._world, self._rank, self._awaited = world, rank, awaited

    def wait(self) -> None:
        for key, into in self._awaited:
            tensors = self._world.receive(key, self._rank)
            sent, expected = (_kinds(group) for group in (tensors, into))
            if sent != expected:
                phase = self._world.phases.get(self._rank, "start")
                what = f"rank {key[1]} sent {sent} where {expected} were expected"
                raise TransportError(self._rank, phase, what)
            for source, target in zip(tensors, into, strict=True):
                target.copy_(source)
        self._awaited = []


def _kinds(tensors: Sequence[Tensor]) -> list[str]:
    return [f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in tensors]


class ThreadTransport(Transport):
    """One simulated rank. Messages between a pair are numbered, so order is theirs alone."""

    name = "threads"

    def __init__(self, world: ThreadWorld, rank: int, members: tuple[int, ...]):
        super().__init__(members.index(rank), len(members), world.device, world.timeout_s)
        self._world, self._members = world, members
        self._reset()

    def _reset(self) -> None:
        """Number messages from 0, as every rank does after a failed run."""
        self._restarts = self._world.restarts
        self._sent = [0] * self.world_size
        self._received = [0] * self.world_size

    def subgroup(self, ranks: Sequence[int]) -> Transport:
        members = tuple(self._members[rank] for rank in ranks)
        return ThreadTransport(self._world, self._members[self.rank], members)

    def barrier(self) -> None:
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        self._exchange([(rank, []) for rank in others], [(rank, []) for rank in others]).wait()

    def check_running(self) -> None:
        if self._world.failure is not None:
            raise _Ended

    def phases(self) -> dict[int, str]:
        return dict(self._world.phases)

    def _publish(self, phase: str) -> None:
        self._world.phases[self._members[self.rank]] = phase

    def _shift(self, send: list[Tensor], to: int, into: list[Tensor], source: int) -> Handle:
        return self._exchange([(to, send)] if send else [], [(source, into)] if into else [])

    def _all_gather(self, tensor: Tensor, into: Tensor) -> Handle:
        into[self.rank].copy_(tensor)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        return self._exchange(
            [(rank, [tensor]) for rank in others], [(rank, [into[rank]]) for rank in others]
        )

    def _all_to_all(self, send: Sequence[Tensor], into: Sequence[Tensor]) -> Handle:
        into[self.rank].copy_(send[self.rank])
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        return self._exchange(
            [(rank, [send[rank]]) for rank in others if send[rank].numel()],
            [(rank, [into[rank]]) for rank in others if into[rank].numel()],
        )

    def _broadcast(self, tensor: Tensor, root: int) -> Handle:
        if self.rank != root:
            return self._exchange([], [(root, [tensor])])
        others = [rank for rank in range(self.world_size) if rank != root]
        return self._exchange([(rank, [tensor]) for rank in others], [])

    def _exchange(
        self, sends: list[tuple[int, list[Tensor]]], receives: list[tuple[int, list[Tensor]]]
    ) -> Handle:
        self.check_running()
        if self._restarts != self._world.restarts:
            self._reset()
        me = self._members[self.rank]
        for rank, tensors in sends:
            key = (self._members, me, self._members[rank], self._sent[rank])
            self._sent[rank] += 1
            self._world.send(me, key, tensors)
        awaited = []
        for rank, into in receives:
            # key[1] is the sender, for messages about a peer that stays silent
            key = (self._members, self._members[rank], me, self._received[rank])
            self._received[rank] += 1
            awaited.append((key, into))
        return _Receipt(self._world, me, awaited)
