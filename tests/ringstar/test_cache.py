"""python -m pytest tests/ringstar/test_cache.py"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringstar.cache import KeptKV, ShardedCache
from ringstar.passes import turn_runs
from seqpar import Run, positions, token_count

KV = (1, 3, 8)  # batch, heads, dim


def kv(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, 3, 8, generator=generator)


runs = st.lists(
    st.builds(
        lambda start, count, step: Run(start, start + (count - 1) * step + 1, step),
        st.integers(0, 30),
        st.integers(1, 6),
        st.integers(1, 4),
    ),
    max_size=8,
)


@given(runs)
def test_positions_stay_in_memory_order(appended):
    cache = KeptKV()
    for run in appended:
        cache.append((run,))
    assert positions(cache.runs) == [p for run in appended for p in run]
    assert cache.tokens == token_count(cache.runs)


def test_generated_tokens_that_go_round_are_one_run():
    cache = KeptKV()
    for position in range(100, 400, 3):
        cache.append((Run(position, position + 1),))
    assert cache.runs == (Run(100, 398, 3),)


def test_what_is_written_is_read_as_a_view():
    cache, k, v = KeptKV(), kv(5), kv(5, seed=1)
    at = cache.append((Run(0, 5),))
    cache.write(0, at, k, v)
    view = cache.view(0, 1, 4)
    assert torch.equal(view.k_BTHD, k[:, 1:4])
    assert torch.equal(view.v_BTHD, v[:, 1:4])
    assert view.k_BTHD.is_contiguous()  # any range can be sent as it is
    assert view.k_BTHD.data_ptr() == cache.view(0, 0, 5).k_BTHD[:, 1:].data_ptr()


def test_growth_keeps_what_was_there():
    cache = KeptKV()
    for step in range(4):
        at = cache.append((Run(3 * step, 3 * step + 3),))
        cache.write(0, at, kv(3, seed=step), kv(3, seed=10 + step))
    for step in range(4):
        assert torch.equal(cache.view(0, 3 * step, 3 * step + 3).k_BTHD, kv(3, seed=step))


def test_room_that_was_reserved_is_allocated_once():
    cache = KeptKV()
    cache.reserve(12)
    cache.write(0, cache.append((Run(0, 5),)), kv(5), kv(5))
    before = cache.view(0, 0, 1).k_BTHD.data_ptr()
    cache.write(0, cache.append((Run(5, 12),)), kv(7), kv(7))
    assert cache.view(0, 0, 1).k_BTHD.data_ptr() == before
    assert cache.nbytes == cache.allocated_nbytes == 12 * 2 * 3 * 8 * 4


@given(runs, st.lists(st.integers(0, 60), max_size=4))
def test_dropping_keeps_the_others_in_order(appended, bounds):
    """KV that says which position it is of."""
    cache, kept = KeptKV(), []
    for index, run in enumerate(appended):
        at = cache.append((run,))
        marked = torch.tensor(list(run), dtype=torch.float32).view(1, -1, 1, 1)
        cache.write(0, at, marked, -marked)
        kept += list(run)
        if index < len(bounds):
            cache.drop_before(bounds[index])
            kept = [position for position in kept if position >= bounds[index]]
        assert positions(cache.runs) == kept and cache.tokens == len(kept)
        view = cache.view(0, 0, cache.tokens)
        assert view.k_BTHD.flatten().tolist() == kept
        assert view.v_BTHD.flatten().tolist() == [-position for position in kept]


def test_memory_that_a_window_left_is_given_back():
    cache = KeptKV()
    cache.write(0, cache.append((Run(0, 50),)), kv(50), kv(50, seed=1))
    cache.drop_before(40)
    cache.fit(5)
    assert torch.equal(cache.view(0, 0, 10).k_BTHD, kv(50)[:, 40:])
    assert cache.allocated_nbytes == 15 * 2 * 3 * 8 * 4


def test_a_window_that_comes_late_is_a_fault():
    cache = ShardedCache()
    cache.append((Run(0, 5),))
    cache.of(None)
    cache.append((Run(5, 8),))
    with pytest.raises(RuntimeError, match="window of 7 came after the first pass"):
        cache.of(7)


def test_truncating_forgets_from_the_end():
    cache = KeptKV()
    cache.write(0, cache.append((Run(0, 5),)), kv(5), kv(5))
    document = cache.runs
    cache.write(0, cache.append((Run(5, 8),)), kv(3), kv(3))
    cache.truncate(document)
    assert (cache.tokens, cache.nbytes) == (5, 5 * 2 * 3 * 8 * 4)


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 9))
def test_a_turn_is_dealt_once_over_ranks(start, tokens, world):
    owned = [turn_runs(start, tokens, rank, world) for rank in range(world)]
    assert sorted(p for runs in owned for p in positions(runs)) == list(
        range(start, start + tokens)
    )
    counts = [token_count(runs) for runs in owned]
    assert max(counts) - min(counts) <= 1


def test_generated_tokens_go_round():
    keepers = [
        next(rank for rank in range(4) if turn_runs(position, 1, rank, 4)) for position in range(8)
    ]
    assert sorted(keepers[:4]) == [0, 1, 2, 3]
    assert keepers[4:] == keepers[:4]
