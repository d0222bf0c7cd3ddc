"""python -m pytest tests/seqpar/test_threads.py"""

import threading
import time

import pytest
import torch

from seqpar import Link, ThreadWorld, TransportError


def test_tensors_are_copied_on_send():
    def rank(t):
        value, got = torch.full((2,), float(t.rank)), torch.empty(2)
        handle = t.shift([value], [got])
        value.fill_(-1.0)  # a fault in real code, which must show as one here: see process
        handle.wait()
        return got.tolist()

    assert ThreadWorld(2).run(rank) == [[1.0, 1.0], [0.0, 0.0]]


def test_an_exception_in_one_rank_ends_the_others_with_it():
    def rank(t):
        t.publish("the middle")
        if t.rank == 2:
            raise KeyError("only here")
        t.shift([torch.zeros(1)], [torch.empty(1)]).wait()
        t.barrier()

    started = time.perf_counter()
    with pytest.raises(KeyError, match="only here") as caught:
        ThreadWorld(4).run(rank)
    assert time.perf_counter() - started < 5
    assert caught.value.__notes__ == ["rank 2, during the middle"]


def test_a_world_can_be_used_again_after_a_failure():
    world = ThreadWorld(3)

    def failing(t):
        t.shift([torch.zeros(1)], [torch.empty(1)])
        if t.rank == 1:
            raise ValueError("once")
        t.barrier()

    with pytest.raises(ValueError, match="once"):
        world.run(failing)

    def gather(t):
        got = torch.empty(3, 1)
        t.all_gather(torch.full((1,), float(t.rank)), got).wait()
        return got.flatten().tolist()

    assert world.run(gather) == [[0.0, 1.0, 2.0]] * 3


def forever(t):
    t.shift([], [torch.empty(1)]).wait()  # nobody sends


def alone(t):
    while True:  # exchanges nothing: it asks
        t.check_running()


@pytest.mark.parametrize(("work", "ranks"), [(forever, 2), (alone, 1)])
def test_ctrl_c_ends_all_ranks(work, ranks, monkeypatch):
    world, working = ThreadWorld(ranks), threading.Event()

    def rank(t):
        working.set()
        work(t)

    def interrupted(self, timeout=None):
        working.wait()
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.run(rank)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]
    assert world.run(lambda t: t.rank) == list(range(ranks))


def test_ctrl_c_while_ranks_start_ends_those_that_did(monkeypatch):
    world, start, started = ThreadWorld(3), threading.Thread.start, []

    def interrupted(self):
        if len(started) == 2:
            raise KeyboardInterrupt
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.run(lambda t: t.barrier())
    monkeypatch.undo()
    assert not any(thread.is_alive() for thread in started)
    assert world.run(lambda t: t.rank) == [0, 1, 2]


def test_the_card_has_a_number(monkeypatch):
    """As models say where they are."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert ThreadWorld(1, device="cuda").device == torch.device("cuda:3")
    assert ThreadWorld(1, device="cuda:1").device == torch.device("cuda:1")


def test_a_silent_peer_is_named_after_the_timeout():
    def rank(t):
        t.publish("waiting" if t.rank == 0 else "asleep")
        if t.rank == 0:
            t.shift([], [torch.empty(1)]).wait()

    with pytest.raises(TransportError, match=r"rank 0 during waiting: .*rank 1 \(in phase asleep"):
        ThreadWorld(2, timeout_s=0.2).run(rank)


def test_ranks_that_disagree_about_shapes_are_told():
    def rank(t):
        t.shift([torch.zeros(2 + t.rank)], [torch.empty(2)]).wait()

    with pytest.raises(TransportError, match=r"sent \['float32 \(3,\)'\] where \['float32 \(2"):
        ThreadWorld(2).run(rank)


def test_the_link_delays_delivery_but_not_the_sender():
    def rank(t):
        t.barrier()
        started = time.perf_counter()
        handle = t.shift([torch.zeros(250)], [torch.empty(250)])  # 1,000 bytes
        posted = time.perf_counter()
        handle.wait()
        return started, posted, time.perf_counter()

    times = ThreadWorld(2, link=Link(0.05, 10_000)).run(rank)
    first = min(started for started, _, _ in times)  # what a rank awaits, another may have sent
    for started, posted, waited in times:
        assert posted - started < 0.15  # a sender that waited for its link would take this long
        assert waited - first >= 0.15


def test_each_rank_runs_in_inference_mode_with_its_own_thread_count():
    def rank(t):
        return torch.is_inference_mode_enabled(), torch.get_num_threads()

    assert ThreadWorld(2, threads_per_rank=1).run(rank) == [(True, 1)] * 2
