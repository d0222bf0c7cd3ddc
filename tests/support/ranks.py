"""Running per-rank test code in real processes (gloo) and in threads."""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from seqpar import ThreadWorld, Transport

# children are forked from a clean server that has these imported, so that a rank starts fast
_PRELOAD = ["torch", "transformers", "transformers.models.llama", "ringstar", "ringattn"]


def in_threads(world: int, rank_fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """`rank_fn(transport, *args)` on simulated ranks; results in rank order."""
    ranks = ThreadWorld(world, timeout_s=60, threads_per_rank=1, **options)
    return ranks.run(lambda transport: rank_fn(transport, *args))


def in_processes(
    world: int, rank_fn: Callable[..., Any], *args: Any, timeout_s: float = 300
) -> Any:
    """The same in `world` gloo processes; `rank_fn` must be importable."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    results = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_rank_main, args=(rank, world, port, rank_fn, args, results))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    collected: dict[int, Any] = {}
    try:
        while len(collected) < world:
            rank, value, error = results.get(timeout=timeout_s)
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            collected[rank] = value
    except queue.Empty:
        missing = sorted(set(range(world)) - set(collected))
        raise AssertionError(f"no result from ranks {missing} in {timeout_s} s") from None
    finally:
        for process in ranks:
            process.join(10 if len(collected) == world else 0.1)
            if process.is_alive():
                process.kill()
    return [collected[rank] for rank in range(world)]


def _rank_main(
    rank: int, world: int, port: int, rank_fn: Callable[..., Any], args: tuple, results: Any
) -> None:
    from seqpar.process import ProcessWorld, connect

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        transport: Transport = connect(
            "gloo", torch.device("cpu"), timeout_s=120, threads_per_rank=1
        )
        (value,) = ProcessWorld(transport).run(lambda t: rank_fn(t, *args))
        results.put((rank, value, None))
        transport.barrier()
        transport.close()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
