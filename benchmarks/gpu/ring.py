"""A ring on one card: the kernel calls of every rank in turn, against one call over all tokens.

T tokens of one rank's share, H query heads, Hkv KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.encode import Shape, backends
from benchmarks.gpu.timing import Bench, Row, Section, relative_error
from localflash import DenseKV, Partial, attend, empty_partial
from ringattn import ExtendPlan
from seqpar import Attend, Layout, accumulate_tiles, positions

WORLD, SHAPE = 8, Shape(8 * 16384, 128, 32, 8, causal=True)


def run(
    bench: Bench,
    shape: Shape = SHAPE,
    world: int = WORLD,
    names: Sequence[str] | None = None,
) -> Section:
    """Kernel seconds of all ranks together / of the one causal call, at most 1.05 is wanted."""
    section = Section(
        "ring",
        f"{world} zigzag ranks in turn, {shape.label}, {shape.heads} heads,"
        " with `into`: kernel seconds of all ranks / of one causal call",
    )
    for name in names or backends(bench.device, bench.dtype, shape.dim):
        if section.out_of_time(bench.budget, name, 5.0):
            continue
        row = section.attempt(name, partial(_ratio, bench, shape, world, name))
        if row is not None:
            section.rows.append({"backend": name} | row)
    return section


def _ratio(bench: Bench, shape: Shape, world: int, name: str) -> Row:
    q, k, v = shape.tensors(bench.device)
    call: Attend = partial(attend, backend=name)
    one = bench.timer.seconds(lambda _: call(q, k, v, shape.band))
    ring = Ranks(q, k, v, world)
    ranks = [bench.timer.seconds(partial(_work, ring, rank, call)) for rank in range(world)]
    last = world - 1
    whole, _ = call(q, k, v, shape.band)
    error = relative_error(ring.attend(last, call)[0], whole[:, ring.own[last]])
    return {
        "one s": one,
        "ranks s": sum(ranks),
        "ratio": sum(ranks) / one,
        "slowest rank": max(ranks) * world / one,
        "of matmul": shape.flops / sum(ranks) / bench.matmul,
        "differs by": error,
    }


def _work(ring: Ranks, rank: int, call: Attend, _: int) -> None:
    ring.attend(rank, call)


class Ranks:
    """Every rank's share of one sequence, as the ring holds it."""

    def __init__(self, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, world: int):
        layout = Layout("zigzag", 0, q_BTHD.shape[1], world)
        self.runs = tuple(layout.runs(rank) for rank in range(world))
        self.own = [torch.tensor(positions(runs), device=q_BTHD.device) for runs in self.runs]
        self.q = [q_BTHD[:, own] for own in self.own]
        self.kv = [DenseKV(k_BTHD[:, own], v_BTHD[:, own]) for own in self.own]

    def attend(self, rank: int, call: Attend) -> Partial:
        """All of this rank's steps, as `ringattn.ring_pass` makes them once KV has arrived."""
        into = empty_partial(self.q[rank])
        plan = ExtendPlan(rank, self.runs, tuple(() for _ in self.runs))
        for step in plan.new_steps():
            accumulate_tiles(self.q[rank], self.kv[step.source], step.tiles, into, call)
        return into
