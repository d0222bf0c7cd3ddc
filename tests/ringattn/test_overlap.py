"""python -m pytest tests/ringattn/test_overlap.py

Transfers are hidden behind compute: shown on a link with a known delay, and by the order of
recorded events, which holds on every transport.
"""

import time

import pytest
import torch

from localflash import DenseKV
from ringattn import ExtendPlan, KVBuffers, PackedPlan, Past, Ring, extend
from seqpar import Layout, Link, ThreadWorld
from tests.support.ranks import in_processes, in_threads

WORLD, TOKENS, HEADS, DIM = 4, 16, 2, 8
SHARD_BYTES = TOKENS * 2 * HEADS * DIM * 4


def one_pass(transport, step_s: float) -> float:
    """Seconds of a zigzag pass whose attention takes `step_s` at each step."""
    runs = tuple(Layout("zigzag", 0, WORLD * TOKENS, WORLD).runs(r) for r in range(WORLD))
    plan = PackedPlan((ExtendPlan(transport.rank, runs, ((),) * WORLD),))
    q = torch.zeros(1, TOKENS, HEADS, DIM)
    new = DenseKV(q.clone(), q.clone())

    # every step takes `step_s`, in however many calls
    pauses = [step_s / len(s.tiles) for s in plan.new_steps() for _ in s.tiles]

    def attend(q, k, v, band, *, into):
        time.sleep(pauses.pop(0))
        return into

    transport.barrier()
    started = time.perf_counter()
    extend(q, new, [Past(new.slice(0, 0), "none")], plan, Ring(transport, attend, KVBuffers()))
    return time.perf_counter() - started


@pytest.mark.parametrize(("step_s", "transfer_s"), [(0.1, 0.1), (0.1, 0.05), (0.05, 0.1)])
def test_a_pass_takes_the_longer_of_compute_and_transfer(step_s, transfer_s):
    link = Link(bytes_per_s=SHARD_BYTES / transfer_s)
    world = ThreadWorld(WORLD, link=link, threads_per_rank=1)
    # the best of three: other processes only make it longer
    took = min(max(world.run(lambda t: one_pass(t, step_s))) for _ in range(3))
    compute, transfer = WORLD * step_s, (WORLD - 1) * transfer_s
    assert took <= 1.1 * max(compute, transfer) + step_s
    assert took >= max(compute, transfer)


def recorded(transport):
    transport.events = []
    one_pass(transport, 0.0)
    return [event.name for event in transport.events if event.name != "post all_gather"]


@pytest.mark.parametrize("runner", [in_threads, in_processes])
def test_each_receive_is_posted_before_its_steps_attention(runner):
    step = ["post shift", "attend", "wait shift", "done shift"]
    for names in runner(WORLD, recorded):
        assert names == step * WORLD
