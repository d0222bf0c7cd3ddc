"""Ranks as processes: torch.distributed over NCCL on CUDA, over gloo elsewhere.

gloo moves CUDA tensors through host copies, so that several ranks can share one card.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar.cores import usable_cores
from seqpar.mesh import LIMIT_BYTES, LocalMesh, same_machine
from seqpar.transport import Done, Handle, Transport, TransportError, once_at_a_time

T = TypeVar("T")

# the newer name; the older one warns where both exist
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ProcessTransport(Transport):
    """One rank of a torch.distributed group.

    `staged` sends through copies in host memory, which gloo needs for CUDA tensors; unless
    given, that is when it is done.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        store: dist.Store,
        device: torch.device,
        timeout_s: float,
        staged: bool | None = None,
    ):
        super().__init__(dist.get_rank(group), dist.get_world_size(group), device, timeout_s)
        self.name = str(dist.get_backend(group))
        self._group, self._store = group, store
        self._parts: list[dist.ProcessGroup] = []
        self._mesh: LocalMesh | None = None
        needed = self.name == "gloo" and device.type != "cpu"
        self._staged = needed if staged is None else staged

    def use_mesh(self, mesh: LocalMesh) -> None:
        """Send small messages over `mesh` instead of the library."""
        self._mesh = mesh

    def subgroup(self, ranks: Sequence[int]) -> Transport:
        members = [dist.get_global_rank(self._group, rank) for rank in ranks]
        group = dist.new_group(members, use_local_synchronization=True)
        self._parts.append(group)
        return ProcessTransport(group, self._store, self.device, self.timeout_s, self._staged)

    def barrier(self) -> None:
        with self._faults_named():
            dist.barrier(self._group)

    def phases(self) -> dict[int, str]:
        keys = {rank: f"phase/{rank}" for rank in range(self.world_size)}
        return {
            rank: self._store.get(key).decode()
            for rank, key in keys.items()
            if self._store.check([key])
        }

    def close(self) -> None:
        if self._mesh is not None:
            self._mesh.close()
        if not dist.is_initialized():
            return
        others = dist.distributed_c10d._world.pg_map.keys() - {self._group, *self._parts}
        if self._group is dist.group.WORLD and others:
            atexit.register(_end_world)  # which would take those of other connections with it
        else:
            dist.destroy_process_group(self._group)

    def abandon(self) -> None:
        if self._mesh is not None:
            self._mesh.close()

    def _publish(self, phase: str) -> None:
        self._store.set(f"phase/{dist.get_rank()}", phase)

    def _shift(self, send: list[Tensor], to: int, into: list[Tensor], source: int) -> Handle:
        send, into = [_on_wire(t) for t in send], [_on_wire(t) for t in into]
        if to == self.rank:
            for tensor, target in zip(send, into, strict=True):
                target.copy_(tensor)
            return Done()
        outgoing, incoming = self._outgoing(send), self._incoming(into)
        ops = [dist.P2POp(dist.isend, t, group=self._group, group_peer=to) for t in outgoing]
        ops += [dist.P2POp(dist.irecv, t, group=self._group, group_peer=source) for t in incoming]
        if not ops:
            return Done()
        with self._faults_named():
            works = dist.batch_isend_irecv(ops)
        return _Works(self, works, outgoing, incoming, into)

    def _all_gather(self, tensor: Tensor, into: Tensor) -> Handle:
        tensor, into = _on_wire(tensor), _on_wire(into)
        (outgoing,), (incoming,) = self._outgoing([tensor]), self._incoming([into])
        if self._small(outgoing):
            incoming[self.rank].copy_(outgoing)
            others = [rank for rank in range(self.world_size) if rank != self.rank]
            work = self._over_mesh(
                dict.fromkeys(others, outgoing), {rank: incoming[rank] for rank in others}
            )
            return _Works(self, [work], [outgoing], [incoming], [into])
        with self._faults_named():
            work = _all_gather(
                incoming.flatten(), outgoing.flatten(), group=self._group, async_op=True
            )
        return _Works(self, [work], [outgoing], [incoming], [into])

    def _all_to_all(self, send: Sequence[Tensor], into: Sequence[Tensor]) -> Handle:
        into[self.rank].copy_(send[self.rank])
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        handles = []
        for distance in range(1, len(others) + 1):  # pairs in the same order on every rank
            to = (self.rank + distance) % self.world_size
            source = (self.rank - distance) % self.world_size
            outgoing = [send[to]] if send[to].numel() else []
            incoming = [into[source]] if into[source].numel() else []
            handles.append(self._shift(outgoing, to, incoming, source))
        return _Together(handles)

    def _broadcast(self, tensor: Tensor, root: int) -> Handle:
        tensor = _on_wire(tensor)
        (moved,) = self._incoming([tensor], keep=True)
        if self._small(moved):
            others = [rank for rank in range(self.world_size) if rank != root]
            work = (
                self._over_mesh(dict.fromkeys(others, moved), {})
                if self.rank == root
                else self._over_mesh({}, {root: moved})
            )
            return _Works(self, [work], [], [moved], [tensor])
        with self._faults_named():
            work = dist.broadcast(moved, group=self._group, group_src=root, async_op=True)
        return _Works(self, [work], [], [moved], [tensor])

    def _small(self, tensor: Tensor) -> bool:
        cpu = tensor.device.type == "cpu"
        return self._mesh is not None and cpu and 0 < tensor.nbytes <= LIMIT_BYTES

    def _over_mesh(self, send: dict[int, Tensor], into: dict[int, Tensor]) -> Handle:
        assert self._mesh is not None
        with self._faults_named():
            return self._mesh.exchange(send, into)

    def _outgoing(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self._staged:
            # a copy to the host keeps strides, and gloo takes none but contiguous tensors
            return [tensor.detach().cpu().contiguous() for tensor in tensors]
        return [tensor.detach().contiguous() for tensor in tensors]

    def _incoming(self, tensors: Sequence[Tensor], keep: bool = False) -> list[Tensor]:
        if self._staged:
            empty = [torch.empty(t.shape, dtype=t.dtype) for t in tensors]
            return [e.copy_(t) for e, t in zip(empty, tensors, strict=True)] if keep else empty
        return list(tensors)

    def _faults_named(self) -> _NamedFaults:
        return _NamedFaults(self)


def _on_wire(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that every library carries: gloo, for one, refuses float8."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


class _NamedFaults:
    """Turns a library's error about a peer into one that names rank and phase."""

    def __init__(self, transport: Transport):
        self._transport = transport

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        fault = isinstance(error, (RuntimeError, OSError))
        if fault and not isinstance(error, TransportError):
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise TransportError(
                self._transport.rank,
                self._transport.phase,
                f"lost contact with another rank ({lines[0]})",
            ) from error


class _Works:
    def __init__(
        self,
        transport: ProcessTransport,
        works: Sequence[Handle | dist.Work],
        outgoing: Sequence[Tensor],
        incoming: Sequence[Tensor],
        into: Sequence[Tensor],
    ):
        self._transport, self._works, self._outgoing = transport, list(works), outgoing
        self._incoming, self._into = incoming, into

    def wait(self) -> None:
        with self._transport._faults_named():
            for work in self._works:
                work.wait()
        for moved, target in zip(self._incoming, self._into, strict=True):
            if moved.data_ptr() != target.data_ptr():
                target.copy_(moved)
        self._works, self._outgoing, self._incoming, self._into = [], [], [], []


class _Together:
    def __init__(self, handles: Sequence[Handle]):
        self._handles = handles

    def wait(self) -> None:
        for handle in self._handles:
            handle.wait()


def under_torchrun() -> bool:
    """Whether this process was started as one rank of several (by torchrun or alike)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_ranks() -> int:
    """Ranks on this machine, by torchrun's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def connect(
    backend: str,
    device: torch.device,
    *,
    timeout_s: float,
    threads_per_rank: int | None = None,
    store: dist.Store | None = None,
    staged: bool | None = None,
) -> ProcessTransport:
    """Join the group that torchrun's environment describes.

    A script that has a default group already keeps it: ours is another one of the same ranks.
    `store` is where phases are published; by default the group's own.  On a CPU the ranks of
    one machine share its cores evenly unless `threads_per_rank` says otherwise.  `staged` is
    that of `ProcessTransport`.
    """
    group, own_store = _group(backend, device, timedelta(seconds=timeout_s))
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if device.type == "cpu":
        torch.set_num_threads(threads_per_rank or max(1, usable_cores() // local_ranks()))
    transport = ProcessTransport(group, store or own_store, device, timeout_s, staged)
    if backend == "gloo" and same_machine(world_size):
        transport.use_mesh(LocalMesh(rank, world_size, own_store, timeout_s))
    _warm_up(transport)
    return transport


def _group(
    backend: str, device: torch.device, timeout: timedelta
) -> tuple[dist.ProcessGroup, dist.Store]:
    """A group of all ranks, and a store whose keys no earlier connection used."""
    if dist.is_initialized():
        store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
        group = dist.new_group(timeout=timeout, backend=backend)
        return group, _unused(store, rank)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store = _unused(store, rank)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if backend == "nccl" else None,
    )
    assert dist.group.WORLD is not None
    return dist.group.WORLD, store


def _end_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _unused(store: dist.Store, rank: int) -> dist.Store:
    """Ranks connect as often as each other, so that they agree on the number without a word."""
    times = store.add(f"ringstar/connections of {rank}", 1)
    return dist.PrefixStore(f"ringstar/{times}", store)


def _warm_up(transport: Transport) -> None:
    """The first exchange between two ranks builds their connection; do it before any timing."""
    one = torch.zeros(1, device=transport.device)
    for distance in range(1, transport.world_size):
        transport.shift([one], [torch.empty_like(one)], distance).wait()
    large = torch.zeros(LIMIT_BYTES, device=transport.device)  # past the mesh
    transport.all_gather(large, large.new_empty(transport.world_size, LIMIT_BYTES)).wait()
    transport.counters.bytes_sent = 0
    transport.counters.calls.clear()


class ProcessWorld:
    """This process's one rank, with the face that `ThreadWorld` has for all of its ranks."""

    def __init__(self, transport: Transport):
        self.transports = [transport]
        self._running, self._failed = threading.Lock(), False

    def run(self, rank_fn: Callable[[Transport], T]) -> list[T]:
        """Run `rank_fn` on this rank; every process of the group does the same.

        After an exception the ranks are out of step, and no further run is possible: end the
        process.  The others then lose contact; until then they wait, for `timeout_s` at most.
        """
        (transport,) = self.transports
        with once_at_a_time(self._running):
            if self._failed:
                raise TransportError(
                    transport.rank, transport.phase, "an earlier run failed; start the ranks again"
                )
            try:
                with torch.inference_mode():
                    return [rank_fn(transport)]
            except BaseException as error:
                if not isinstance(error, TransportError):  # which says so itself
                    error.add_note(f"rank {transport.rank}, during {transport.phase}")
                self._failed = True
                transport.abandon()
                raise
