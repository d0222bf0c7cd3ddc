"""A transport that delegates, and records what it delegates: transfers, waits and phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from ringstar.ranks import Ranks
from ringstar.trace.recorder import Recorder
from seqpar import Handle, Transport

T = TypeVar("T")


class TracedTransport(Transport):
    """One rank's end of a group, as `inner` has it; counters are the same object."""

    def __init__(self, inner: Transport, recorder: Recorder):
        super().__init__(inner.rank, inner.world_size, inner.device, inner.timeout_s)
        self.name, self.counters, self.phase = inner.name, inner.counters, inner.phase
        self.inner, self.recorder = inner, recorder
        self._counted = True

    def shift(self, send: Sequence[Tensor], into: Sequence[Tensor], distance: int = 1) -> Handle:
        to, source = ((self.rank + step) % self.world_size for step in (distance, -distance))
        received = _nbytes(into)
        if not received and not _nbytes(send):
            return self.inner.shift(send, into, distance)  # nothing travels
        about = {"to": to, "from": source, "received": received}
        return self._recorded(
            f"shift to {to}", about, lambda: self.inner.shift(send, into, distance)
        )

    def all_gather(self, tensor: Tensor, into: Tensor) -> Handle:
        about = {"with": "all", "received": _nbytes([into]) - _nbytes([tensor])}
        return self._recorded("all_gather", about, lambda: self.inner.all_gather(tensor, into))

    def all_to_all(self, send: Sequence[Tensor], into: Sequence[Tensor]) -> Handle:
        own = _nbytes([into[self.rank]])
        about = {"with": "all", "received": _nbytes(into) - own}
        return self._recorded("all_to_all", about, lambda: self.inner.all_to_all(send, into))

    def broadcast(self, tensor: Tensor, root: int) -> Handle:
        received = 0 if self.rank == root else _nbytes([tensor])
        about = {"from": root, "received": received}
        return self._recorded("broadcast", about, lambda: self.inner.broadcast(tensor, root))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        before, self._counted = self._counted, False
        try:
            with self.inner.uncounted():
                yield
        finally:
            self._counted = before

    def barrier(self) -> None:
        began = self.recorder.begin("wait barrier")
        self.inner.barrier()
        self.recorder.end("wait", "barrier", began, {})

    def subgroup(self, ranks: Sequence[int]) -> Transport:
        return TracedTransport(self.inner.subgroup(ranks), self.recorder)

    def publish(self, phase: str) -> None:
        self.recorder.enter_phase(phase)
        self.phase = phase
        self.inner.publish(phase)

    def check_running(self) -> None:
        self.inner.check_running()

    def phases(self) -> dict[int, str]:
        return self.inner.phases()

    def mark(self, name: str, **details: Any) -> None:
        self.recorder.about = details
        self.inner.mark(name, **details)

    def close(self) -> None:
        self.inner.close()

    def abandon(self) -> None:
        self.inner.abandon()

    def _recorded(self, name: str, about: dict[str, Any], post: Callable[[], Handle]) -> Handle:
        """Post, and see what it sent; the transfer is over when somebody has waited for it."""
        clock, sent = self.recorder.clock, self.counters.bytes_sent
        began = clock.stamp()
        handle = post()
        about["sent"] = self.counters.bytes_sent - sent
        about["counted"] = self._counted
        return _TracedHandle(handle, self.recorder, name, began, about)

    # the public ones delegate, so that these are never asked
    def _shift(self, send: list[Tensor], to: int, into: list[Tensor], source: int) -> Handle:
        raise NotImplementedError

    def _all_gather(self, tensor: Tensor, into: Tensor) -> Handle:
        raise NotImplementedError

    def _all_to_all(self, send: Sequence[Tensor], into: Sequence[Tensor]) -> Handle:
        raise NotImplementedError

    def _broadcast(self, tensor: Tensor, root: int) -> Handle:
        raise NotImplementedError

    def _publish(self, phase: str) -> None:
        raise NotImplementedError


class _TracedHandle:
    __slots__ = ("_about", "_began", "_handle", "_name", "_over", "_recorder")

    def __init__(
        self, handle: Handle, recorder: Recorder, name: str, began: Any, about: dict[str, Any]
    ):
        self._handle, self._recorder, self._name = handle, recorder, name
        self._began, self._about, self._over = began, about, False

    def wait(self) -> None:
        if self._over:
            return self._handle.wait()
        self._over, recorder = True, self._recorder
        recorder.clock.enter(self._name)
        waited = recorder.clock.stamp()
        self._handle.wait()
        ended = recorder.clock.stamp()
        recorder.clock.leave()
        recorder.add("wait", self._name, waited, ended, {})
        recorder.add("transfer", self._name, self._began, ended, self._about)


class TracedRanks:
    """The ranks of this process, each behind its `TracedTransport`."""

    def __init__(self, inner: Ranks, recorders: Sequence[Recorder]):
        self._inner = inner
        self.transports = [
            TracedTransport(transport, recorder)
            for transport, recorder in zip(inner.transports, recorders, strict=True)
        ]
        self._by_rank = {transport.rank: transport for transport in self.transports}

    def run(self, rank_fn: Callable[[Transport], T]) -> list[T]:
        """As the ranks themselves; phases do not reach from one run into the next."""

        def traced(inner: Transport) -> T:
            transport = self._by_rank[inner.rank]
            transport.recorder.enter_phase(None)
            try:
                return rank_fn(transport)
            finally:
                transport.recorder.enter_phase(None)

        return self._inner.run(traced)


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
