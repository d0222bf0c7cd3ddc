"""The processes of a benchmark, one after another: ceilings, our ranks, peers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.bench import attention
from launch.bench.plan import Plan
from launch.start import check_launch
from ringstar.config import BenchConfig, RingConfig

# what only the whole has, or what differs for each
_NOT_HANDED_ON = {
    *("bench.worlds", "bench.peers", "bench.rounds"),
    *("bench.against", "bench.picture", "bench.cells"),
    *("launch.nproc", "transport.world_size", "output.path"),
}


@dataclass(frozen=True, slots=True)
class Child:
    """`python -m module` on `nproc` processes; a fault of a `peer` is none of ours."""

    module: str
    arguments: list[str]
    nproc: int
    peer: bool = False


def children(plan: Plan, arguments: Sequence[str], cells: Path) -> Iterator[Child]:
    """Everyone who is measured, in the order of the tables, between two looks at the machine."""
    kept = [a for a in arguments if a.partition("=")[0] not in _NOT_HANDED_ON]
    kept += [f"bench.cells={cells}", "bench.rounds=1"]
    alone = [a for a in kept if a.partition("=")[0] != "transport"]
    alone.append("bench.worlds=1")
    ceilings = Child("launch.bench.ceilings", [*alone, "bench.peers=none"], 1)
    yield ceilings
    for _ in range(plan.config.bench.rounds):
        yield from _round(plan, kept, alone)
    yield ceilings  # again: the machine may have been busy


def _round(plan: Plan, kept: Sequence[str], alone: Sequence[str]) -> Iterator[Child]:
    """Everyone once; `alone` are the arguments of those that run in one process."""
    for world in plan.worlds:
        own = [*kept, f"bench.worlds={world}", "bench.peers=none"]
        if plan.config.transport.name == "threads":
            yield Child("launch.bench.ranks", [*own, f"transport.world_size={world}"], 1)
        else:
            yield Child("launch.bench.ranks", own, world)
    for world in plan.worlds if attention.PEER in plan.peers else ():
        own = [*kept, f"bench.worlds={world}", f"bench.peers={attention.PEER}"]
        yield Child("launch.bench.attention_ranks", own, world, peer=True)
    for peer in plan.processes:
        yield Child("launch.bench.peer", [*alone, f"bench.peers={peer}"], 1, peer=True)


def check_world(config: BenchConfig, world: int) -> None:
    """What `check_launch` refuses for one of several numbers of ranks; raises UserError."""
    if config.transport.name == "threads":
        return
    transport = replace(config.transport, world_size=None)
    launch = replace(config.launch, nproc=world)
    check_launch(replace(config, transport=transport, launch=launch, strategy=RingConfig()))
