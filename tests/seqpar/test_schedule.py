"""python -m pytest tests/seqpar/test_schedule.py

Plans are checked against the definition: which query may see which key, pair by pair.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from localflash import Band
from seqpar import Layout, Run, positions, ring_steps, tiles, token_count

KINDS = st.sampled_from(("zigzag", "striped", "contiguous"))
windows = st.one_of(st.none(), st.integers(1, 30))


def seen(tile, q_count, k_count):
    """Pairs of local indices that one tile computes."""
    for i in range(*tile.q.indices(q_count)):
        for j in range(*tile.k.indices(k_count)):
            if tile.band is None or in_band(tile.band, i - tile.q.start, j - tile.k.start):
                yield i, j


def in_band(band: Band, row: int, column: int) -> bool:
    s = band.q_start + row * band.q_step
    p = band.k_start + column * band.k_step
    return p <= s and (band.window is None or p > s - band.window)


def wanted(q_positions, k_positions, window):
    return sorted(
        (i, j)
        for i, s in enumerate(q_positions)
        for j, p in enumerate(k_positions)
        if p <= s and (window is None or p > s - window)
    )


@given(KINDS, KINDS, st.integers(0, 40), st.integers(0, 40), st.integers(1, 5), windows, st.data())
def test_tiles_cover_each_visible_pair_once(kind, past_kind, past, new, world, window, data):
    q_layout, k_layout = Layout(kind, past, past + new, world), Layout(past_kind, 0, past, world)
    q_rank, k_rank = (data.draw(st.integers(0, world - 1)) for _ in range(2))
    q_runs = q_layout.runs(q_rank)
    k_runs = k_layout.runs(k_rank) + q_layout.runs(k_rank)
    q_positions, k_positions = positions(q_runs), positions(k_runs)
    got = [
        pair
        for tile in tiles(q_runs, k_runs, window)
        for pair in seen(tile, len(q_positions), len(k_positions))
    ]
    assert sorted(got) == wanted(q_positions, k_positions, window)


@settings(max_examples=60)
@given(KINDS, st.integers(0, 50), st.integers(1, 6), windows)
def test_a_pass_sees_all_and_transfers_match(kind, length, world, window):
    runs = [Layout(kind, 0, length, world).runs(rank) for rank in range(world)]
    schedule = [ring_steps(rank, runs, runs, window) for rank in range(world)]
    held = list(runs)
    for step in range(world):
        moved = []
        for rank in range(world):
            now, before = schedule[rank][step], schedule[(rank - 1) % world][step]
            assert now.source == (rank - step) % world
            assert now.receive == before.send
            assert not now.tiles or held[rank] is not None, "KV that is needed was not passed on"
            assert now.send in (0, token_count(held[rank] or ()))
            moved.append(held[(rank - 1) % world] if now.receive else None)
        held = moved
        assert step < world - 1 or not any(schedule[rank][step].send for rank in range(world))
    for rank in range(world):
        computed = sum(
            1
            for step in schedule[rank]
            for tile in step.tiles
            for _ in seen(tile, token_count(runs[rank]), token_count(runs[step.source]))
        )
        mine = positions(runs[rank])
        assert computed == len(wanted(mine, range(length), window))


@given(st.integers(2, 8), st.integers(1, 20))
def test_a_zigzag_step_is_one_kernel_call_after_the_first(world, piece):
    runs = [Layout("zigzag", 0, 2 * world * piece, world).runs(rank) for rank in range(world)]
    for rank in range(world):
        first, *others = ring_steps(rank, runs, runs)
        assert len(first.tiles) <= 2
        assert all(len(step.tiles) == 1 for step in others)
        assert all(step.tiles[0].band is None for step in others)


def test_what_no_rank_further_round_sees_is_not_sent():
    runs = [Layout("contiguous", 0, 40, 4).runs(rank) for rank in range(4)]
    sent = [[step.send for step in ring_steps(rank, runs, runs)] for rank in range(4)]
    # the last piece is seen by nobody else, the first by everybody
    assert sent == [[10, 0, 0, 0], [10, 10, 0, 0], [10, 10, 10, 0], [0, 0, 0, 0]]


def test_a_window_skips_steps_that_it_cannot_reach():
    runs = [Layout("contiguous", 0, 40, 4).runs(rank) for rank in range(4)]
    busy = [sum(bool(step.tiles) for step in ring_steps(rank, runs, runs, 5)) for rank in range(4)]
    assert busy == [1, 2, 2, 2]


def test_keys_before_the_band_join_it():
    (tile,) = tiles((Run(20, 30),), (Run(0, 20), Run(20, 30)))
    assert (tile.q, tile.k) == (slice(0, 10), slice(0, 30))
