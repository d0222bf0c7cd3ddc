"""Starting this process's end of the ranks: which transport, which device, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch.distributed import Store

from ringstar.config import Config, DenseConfig, TransportConfig
from ringstar.errors import Refusal, UserError
from seqpar import ThreadWorld, Transport
from seqpar.cores import usable_cores
from seqpar.process import ProcessWorld, connect, local_ranks, under_torchrun

__all__ = [
    "Ranks",
    "Transport",
    "check_gpus",
    "check_ranks",
    "check_strategy",
    "make_ranks",
    "run_or_refuse",
    "under_torchrun",
    "usable_cores",
    "world_size_of",
]

T = TypeVar("T")


class Ranks(Protocol):
    """The ranks that live in this process: all of them (threads), or one."""

    @property
    def transports(self) -> Sequence[Transport]: ...

    def run(self, rank_fn: Callable[[Transport], T]) -> list[T]:
        """Run `rank_fn` on each of them; results in rank order."""
        ...


def run_or_refuse(ranks: Ranks, rank_fn: Callable[[Transport], T]) -> list[T]:
    """`ranks.run`, after whose Refusal there can be another: a fault would end the ranks."""

    def run(transport: Transport) -> T | Refusal:
        try:
            return rank_fn(transport)
        except Refusal as refusal:
            return refusal

    results: list[T] = []
    for result in ranks.run(run):
        if isinstance(result, Refusal):
            raise result
        results.append(result)
    return results


def world_size_of(config: TransportConfig) -> int:
    """How many ranks there will be, from torchrun's environment or the config."""
    if not under_torchrun() or config.name == "threads":
        return config.world_size or 1
    started = int(os.environ["WORLD_SIZE"])
    if config.world_size not in (None, started):
        raise UserError(
            "transport.world_size", config.world_size, f"torchrun started {started} ranks"
        )
    return started


def check_ranks(config: Config) -> None:
    """Raise UserError for a transport, device or strategy that these ranks cannot have."""
    world_size, name = world_size_of(config.transport), config.transport.name
    check_strategy(config, world_size)
    if name == "threads" and under_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
        raise UserError("transport", name, "simulated ranks are one process; torchrun started more")
    if name in ("nccl", "gloo") and not under_torchrun():
        raise UserError("transport", name, "needs ranks: launch.nproc=N, or start with torchrun")
    if name == "nccl":
        check_gpus(local_ranks())


def check_strategy(config: Config, world_size: int) -> None:
    """Raise UserError for a strategy that so many ranks cannot run."""
    if isinstance(config.strategy, DenseConfig) and world_size > 1:
        raise UserError("strategy", "dense", f"runs on one rank, not {world_size}; use ring")


def check_gpus(ranks: int) -> None:
    """NCCL needs a GPU for each rank on this machine."""
    gpus = torch.cuda.device_count()
    if gpus == 0:
        raise UserError("transport", "nccl", "needs GPUs, and there is none; use gloo")
    if ranks > gpus:
        raise UserError("transport", "nccl", f"{ranks} ranks but {gpus} GPUs on this machine")


def make_ranks(
    config: TransportConfig, phases: Store | None = None, device: torch.device | None = None
) -> tuple[Ranks, str]:
    """Connect, and say why it was done like this.

    `phases` is where ranks publish what they are doing, if not in their own group's store;
    `device` is this process's, if that is settled already.
    """
    if not under_torchrun() or config.name == "threads":
        size = config.world_size or 1
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reason = "simulated ranks, as asked" if config.name == "threads" else "one process"
        world = ThreadWorld(
            size,
            device=device,
            timeout_s=config.timeout_s,
            threads_per_rank=config.threads_per_rank,
        )
        return world, reason
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL and new tensors go by it
    name, reason = _backend(config.name, device)
    transport = connect(
        name,
        device or _device(),
        timeout_s=config.timeout_s,
        threads_per_rank=config.threads_per_rank,
        store=phases,
    )
    return ProcessWorld(transport), reason


def _backend(name: str, device: torch.device | None) -> tuple[str, str]:
    if name != "auto":
        return name, "as asked"
    if device is not None and device.type == "cpu":
        return "gloo", "on the CPU"
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return "gloo", "no GPU"
    if local_ranks() > gpus:
        return "gloo", f"{local_ranks()} ranks share {gpus} GPUs, which NCCL refuses"
    return "nccl", "a GPU for each rank"


def _device() -> torch.device:
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    torch.cuda.set_device(device)
    return device
