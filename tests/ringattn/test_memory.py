"""python -m pytest tests/ringattn/test_memory.py

The peak of a ring pass, counted from live tensors, is what the plan says, at any world size.
"""

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from localflash import DenseKV, attend
from ringattn import Costs, ExtendPlan, KVBuffers, PackedPlan, Past, Ring, extend
from seqpar import Layout
from tests.support.ranks import in_processes

HEADS, KV_HEADS, DIM, TOKENS = 6, 2, 16, 512
COSTS = Costs(heads=HEADS, head_dim=DIM, itemsize=4, kv_bytes=2 * KV_HEADS * DIM * 4)
WORLDS = (2, 3, 4, 8)
LAYOUTS = ("zigzag", "striped", "contiguous")
NO_PAST = Past(DenseKV(*torch.empty(2, 1, 0, KV_HEADS, DIM)), "none")


def measured(transport, layout, kernel):
    """(peak of the pass, what the plan says) on this rank."""
    world = transport.world_size
    runs = tuple(Layout(layout, 0, TOKENS * world, world).runs(r) for r in range(world))
    alone = ExtendPlan(transport.rank, runs, ((),) * world)
    plan = PackedPlan((alone,))
    torch.manual_seed(transport.rank)
    q = torch.randn(1, TOKENS, HEADS, DIM)
    new = DenseKV(torch.randn(1, TOKENS, KV_HEADS, DIM), torch.randn(1, TOKENS, KV_HEADS, DIM))
    steps = plan.new_steps()
    kernel_bytes = max(workspace(kernel, q, new, tile) for step in steps for tile in step.tiles)
    with LiveBytes() as memory:
        extend(q, new, [NO_PAST], plan, Ring(transport, kernel, KVBuffers()))
    return memory.peak, alone.pass_bytes(COSTS, kernel_bytes)


def workspace(kernel, q, kv, tile):
    """What one kernel call takes beyond its arguments."""
    part = kv.slice(tile.k.start, tile.k.stop)
    rows = q[:, tile.q]
    into = torch.zeros(rows.shape), torch.full((1, HEADS, rows.shape[1]), -torch.inf)
    with LiveBytes() as memory:
        kernel(rows, part.k_BTHD, part.v_BTHD, tile.band, into=into)
    return memory.peak


def in_place(q, k, v, band, *, into):
    """A kernel that accumulates without scratch, as the GPU ones do."""
    return into


KERNELS = (in_place, attend)


def all_measured(transport):
    """One start of the ranks for every layout and kernel."""
    return {
        (layout, kernel.__name__): measured(transport, layout, kernel)
        for layout in LAYOUTS
        for kernel in KERNELS
    }


@pytest.fixture(scope="module")
def passes():
    """Of each world, what its ranks measured."""
    return {world: in_processes(world, all_measured) for world in WORLDS}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [kernel.__name__ for kernel in KERNELS])
def test_a_pass_allocates_what_the_plan_says(passes, layout, kernel):
    peaks = {}
    for world, ranks in passes.items():
        for found in ranks:
            peak, planned = found[layout, kernel]
            assert abs(peak - planned) <= 0.02 * planned
        peaks[world] = max(found[layout, kernel][0] for found in ranks)
    # flat from 2 ranks to 8 at the same local length
    assert max(peaks.values()) <= 1.02 * min(peaks.values())
