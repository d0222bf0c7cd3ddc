"""Real ranks on this machine from a function: for scripts, benchmarks and tests.

Programs that own their processes' fate use torchrun or `launch.nproc`; this is the shortest way
to run `rank_fn(transport, *args)` in `world_size` processes and get the results back.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from seqpar.process import ProcessWorld, connect


@dataclass(frozen=True, slots=True)
class Start:
    """How ranks are started and connected.

    Every rank computes on `device`; `staged` is that of `seqpar.process.ProcessTransport`, and
    `environment` is added to each process's own before it connects (settings of NCCL).
    """

    backend: str = "gloo"
    device: str = "cpu"
    staged: bool | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def run_processes(
    world_size: int,
    rank_fn: Callable[..., Any],
    *args: Any,
    threads_per_rank: int = 1,
    timeout_s: float = 600.0,
    preload: Sequence[str] = ("torch", "seqpar"),
    start: Start | None = None,
) -> list[Any]:
    """`rank_fn(transport, *args)` in processes, gloo on the CPU by default; results by rank.

    `rank_fn`, its arguments and its result must be picklable.  On the CPU ranks are forked from
    a clean server that has imported `preload`, so that they start fast.

    Raises:
        RuntimeError: a rank failed (its traceback is in the message) or did not answer in time.
    """
    start = start or Start()
    context = _context(start, preload)
    results = context.Queue()
    port = free_port()
    ranks = [
        context.Process(
            target=_rank_main,
            args=(
                *(rank, world_size, port, threads_per_rank, timeout_s),
                *(start, rank_fn, args, results),
            ),
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    collected: dict[int, Any] = {}
    give_up_at = time.monotonic() + timeout_s
    try:
        while len(collected) < world_size:
            silent = [rank for rank in range(world_size) if rank not in collected]
            try:
                # time for the others to say what they saw
                rank, pickled, error = results.get(timeout=5)
            except queue.Empty:
                dead = [rank for rank in silent if ranks[rank].exitcode is not None]
                if dead and results.empty():
                    code = ranks[dead[0]].exitcode
                    raise RuntimeError(f"rank {dead[0]} ended with status {code}") from None
                if time.monotonic() > give_up_at:
                    raise RuntimeError(f"no result of ranks {silent} in {timeout_s:g} s") from None
                continue
            if error:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
            collected[rank] = pickle.loads(pickled)
    finally:
        for process in ranks:
            process.join(10 if len(collected) == world_size else 0.1)
            if process.is_alive():
                process.kill()
    return [collected[rank] for rank in range(world_size)]


def _context(start: Start, preload: Sequence[str]) -> Any:
    if start.device != "cpu":
        return mp.get_context("spawn")  # CUDA does not outlive a fork
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    threads_per_rank: int,
    timeout_s: float,
    start: Start,
    rank_fn: Callable[..., Any],
    args: tuple,
    results: Any,
) -> None:
    os.environ |= {  # what torchrun would set
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **start.environment,
    }
    try:
        device = torch.device(start.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        transport = connect(
            start.backend,
            device,
            timeout_s=timeout_s,
            threads_per_rank=threads_per_rank,
            staged=start.staged,
        )
        (value,) = ProcessWorld(transport).run(lambda t: rank_fn(t, *args))
        # as bytes: the queue would send a tensor's memory, which is gone with this process
        results.put((rank, pickle.dumps(value), None))
        transport.barrier()
        transport.close()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
