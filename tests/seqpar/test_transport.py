"""python -m pytest tests/seqpar/test_transport.py

One contract suite for both transports: each case is per-rank code that asserts.
"""

import multiprocessing as mp
import os
import time

import pytest
import torch

from seqpar import TransportError, spawn
from seqpar.spawn import Start
from tests.support.ranks import in_processes, in_threads

KV_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.bfloat16)
RUNNERS = {"threads": in_threads, "gloo": in_processes}


def tagged(rank: int, count: int, dtype=torch.float32) -> torch.Tensor:
    return torch.arange(count).add(100 * rank).to(dtype)


def noise(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bits at all, nan among them."""
    generator = torch.Generator().manual_seed(rank)
    nbytes = (count * dtype.itemsize,)
    return torch.randint(256, nbytes, generator=generator, dtype=torch.uint8).view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def shift_moves_both_ways(t):
    for distance in range(-t.world_size, t.world_size + 1):
        got = torch.empty(5)
        t.shift([tagged(t.rank, 5)], [got], distance).wait()
        assert torch.equal(got, tagged((t.rank - distance) % t.world_size, 5))


def shift_takes_any_sizes_and_nothing(t):
    sizes = [(3 * rank) % 4 for rank in range(t.world_size)]  # some are 0
    before = (t.rank - 1) % t.world_size
    got = torch.empty(sizes[before], 2)
    t.shift([tagged(t.rank, 2 * sizes[t.rank]).view(-1, 2)], [got]).wait()
    assert torch.equal(got, tagged(before, 2 * sizes[before]).view(-1, 2))
    t.shift([], []).wait()


def shift_keeps_several_tensors_and_dtypes_apart(t):
    before = (t.rank - 1) % t.world_size
    got = [torch.empty(4, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int64)]
    sent = [tagged(t.rank, 4, torch.bfloat16), tagged(t.rank, 3, torch.int64)]
    t.shift(sent, got).wait()
    assert torch.equal(got[0], tagged(before, 4, torch.bfloat16))
    assert torch.equal(got[1], tagged(before, 3, torch.int64))


def shifts_under_way_together_arrive_in_order(t):
    got = [torch.empty(2) for _ in range(4)]
    handles = [t.shift([tagged(t.rank + 10 * i, 2)], [g]) for i, g in enumerate(got)]
    for handle in reversed(handles):
        handle.wait()
    before = (t.rank - 1) % t.world_size
    for i, g in enumerate(got):
        assert torch.equal(g, tagged(before + 10 * i, 2))


def all_gather_is_in_rank_order(t):
    got = torch.empty(t.world_size, 2, 3)
    t.all_gather(tagged(t.rank, 6).view(2, 3), got).wait()
    assert torch.equal(got, torch.stack([tagged(r, 6).view(2, 3) for r in range(t.world_size)]))


def all_to_all_takes_unequal_sizes(t):
    def size(source, target):
        return (source + 2 * target) % 3

    send = [tagged(10 * t.rank + r, size(t.rank, r)) for r in range(t.world_size)]
    got = [torch.empty(size(r, t.rank)) for r in range(t.world_size)]
    t.all_to_all(send, got).wait()
    for r in range(t.world_size):
        assert torch.equal(got[r], tagged(10 * r + t.rank, size(r, t.rank)))


def broadcast_comes_from_the_root(t):
    for root in range(t.world_size):
        value = tagged(t.rank, 4)
        t.broadcast(value, root).wait()
        assert torch.equal(value, tagged(root, 4))


def small_and_large_collectives_mix(t):
    sizes = [10, 20_000, 3, 40_000]  # the larger ones do not fit into one small message
    got = [torch.empty(t.world_size, size) for size in sizes]
    handles = [
        t.all_gather(tagged(t.rank, size), into) for size, into in zip(sizes, got, strict=True)
    ]
    value = tagged(t.rank, 7)
    handles.append(t.broadcast(value, root=t.world_size - 1))
    for handle in reversed(handles):
        handle.wait()
    for size, into in zip(sizes, got, strict=True):
        assert torch.equal(into, torch.stack([tagged(r, size) for r in range(t.world_size)]))
    assert torch.equal(value, tagged(t.world_size - 1, 7))


def every_form_of_kv_is_carried_bit_for_bit(t):
    """int8, float8 and their scales, in small messages and in large ones."""
    before = (t.rank - 1) % t.world_size
    for count in (7, 100_000):
        sent, received, gathered = (
            [noise(rank, count, dtype) for dtype in KV_DTYPES] for rank in (t.rank, before, 0)
        )
        got = [torch.empty_like(tensor) for tensor in sent]
        t.shift(sent, got).wait()
        assert all(same_bits(*pair) for pair in zip(got, received, strict=True))
        for i, tensor in enumerate(sent):
            into = tensor.new_empty(t.world_size, count)
            t.all_gather(tensor, into).wait()
            assert all(same_bits(into[r], noise(r, count, tensor.dtype)) for r in range(len(into)))
            t.broadcast(tensor, root=0).wait()
            assert tensor.dtype == KV_DTYPES[i] and same_bits(tensor, gathered[i])


def subgroups_number_their_own_ranks(t):
    members = list(range(t.rank % 2, t.world_size, 2))
    group = t.subgroup(members)
    assert (group.rank, group.world_size) == (members.index(t.rank), len(members))
    got = torch.empty(group.world_size, 1)
    group.all_gather(tagged(t.rank, 1), got).wait()
    assert got.flatten().tolist() == [100.0 * member for member in members]


def phases_are_seen_by_all(t):
    t.publish(f"phase of {t.rank}")
    want = {rank: f"phase of {rank}" for rank in range(t.world_size)}
    until = time.monotonic() + 10
    while t.phases() != want and time.monotonic() < until:
        time.sleep(0.01)  # a store answers its writers at once, and its readers when it has come
    assert t.phases() == want
    t.barrier()


def counters_count_payload(t):
    others = t.world_size - 1
    t.shift([torch.zeros(10)], [torch.empty(10)]).wait()
    t.all_gather(torch.zeros(3), torch.empty(t.world_size, 3)).wait()
    t.broadcast(torch.zeros(5), root=0).wait()
    sent = 40 + 12 * others + (20 * others if t.rank == 0 else 0)
    assert t.counters.bytes_sent == sent
    assert t.counters.calls == {"shift": 1, "all_gather": 1, "broadcast": 1}


def sent_tensors_may_be_changed_after_the_wait(t):
    value, got = tagged(t.rank, 3), torch.empty(3)
    t.shift([value], [got]).wait()
    value.fill_(-1)
    t.barrier()
    assert torch.equal(got, tagged((t.rank - 1) % t.world_size, 3))


def events_tell_what_was_posted_and_awaited(t):
    t.events = []
    handle = t.shift([torch.zeros(2)], [torch.empty(2)])
    t.mark("work", step=3)
    handle.wait()
    assert [event.name for event in t.events] == [
        "post shift",
        "work",
        "wait shift",
        "done shift",
    ]
    assert t.events[0].details == {"sent": 8, "received": 8, "distance": 1}


CONTRACT = [
    shift_moves_both_ways,
    shift_takes_any_sizes_and_nothing,
    shift_keeps_several_tensors_and_dtypes_apart,
    shifts_under_way_together_arrive_in_order,
    all_gather_is_in_rank_order,
    all_to_all_takes_unequal_sizes,
    broadcast_comes_from_the_root,
    small_and_large_collectives_mix,
    every_form_of_kv_is_carried_bit_for_bit,
    subgroups_number_their_own_ranks,
    phases_are_seen_by_all,
    counters_count_payload,
    sent_tensors_may_be_changed_after_the_wait,
    events_tell_what_was_posted_and_awaited,
]


def lose_a_rank(t):
    t.publish("the middle")
    if t.rank == 1:
        os._exit(1)
    faults = []
    for collective in (
        lambda: t.all_gather(torch.zeros(3), torch.empty(t.world_size, 3)),
        lambda: t.all_gather(torch.zeros(30_000), torch.empty(t.world_size, 30_000)),
        lambda: t.shift([torch.zeros(100_000)], [torch.empty(100_000)]),
    ):
        with pytest.raises(TransportError, match="rank 0 during the middle: lost contact") as fault:
            collective().wait()
        faults.append(str(fault.value))
    raise KeyError("; ".join(faults))  # this rank is done: its barrier could not be


def test_a_rank_that_is_gone_is_an_error_with_rank_and_phase():
    with pytest.raises(RuntimeError, match=r"rank 0 failed:[\s\S]*KeyError: .*(lost contact.*){3}"):
        in_processes(2, lose_a_rank)


def run_contract(t):
    for case in CONTRACT:
        t.counters.bytes_sent = 0
        t.counters.calls.clear()
        t.barrier()
        try:
            case(t)
        except Exception as error:
            raise AssertionError(f"{case.__name__}: {error}") from error
        t.events = None


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("runner", RUNNERS)
def test_contract(runner, world):
    RUNNERS[runner](world, run_contract)


def shift_sends_what_is_not_contiguous(t):
    value, got = tagged(t.rank, 12).view(3, 4).t(), torch.empty(4, 3)
    t.shift([value], [got]).wait()
    assert torch.equal(got, tagged((t.rank - 1) % t.world_size, 12).view(3, 4).t())


def staged_contract(t):
    assert t._staged
    run_contract(t)
    shift_sends_what_is_not_contiguous(t)
    assert t.subgroup(range(t.world_size))._staged


def test_contract_through_host_copies():
    """What gloo does with CUDA tensors, here with those of the CPU."""
    in_processes(3, staged_contract, start=Start(staged=True))


@pytest.mark.parametrize("runner", RUNNERS)
def test_strides_are_free_in_what_is_sent(runner):
    RUNNERS[runner](2, shift_sends_what_is_not_contiguous)


def environment_is_there_before_connecting(t):
    assert os.environ["SOME_SETTING"] == "3"
    shift_moves_both_ways(t)


def test_ranks_started_afresh_as_cuda_needs(monkeypatch):
    monkeypatch.setattr(spawn, "_context", lambda start, preload: mp.get_context("spawn"))
    start = Start(environment={"SOME_SETTING": "3"})
    in_processes(2, environment_is_there_before_connecting, start=start)
