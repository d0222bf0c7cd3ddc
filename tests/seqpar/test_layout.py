"""python -m pytest tests/seqpar/test_layout.py"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar import Layout, Run, positions

KINDS = ("zigzag", "striped", "contiguous")
layouts = st.builds(
    lambda kind, start, length, world: Layout(kind, start, start + length, world),
    st.sampled_from(KINDS),
    st.integers(0, 50),
    st.integers(0, 200),
    st.integers(1, 9),
)


@given(layouts)
def test_every_position_is_owned_once(layout):
    owned = [p for rank in range(layout.world) for p in positions(layout.runs(rank))]
    assert sorted(owned) == list(range(layout.start, layout.stop))


@given(layouts)
def test_owner_is_the_inverse(layout):
    for rank in range(layout.world):
        for index, position in enumerate(positions(layout.runs(rank))):
            assert layout.owner(position) == (rank, index)


@given(layouts)
def test_shares_are_even(layout):
    counts = [layout.count(rank) for rank in range(layout.world)]
    assert max(counts) - min(counts) <= (2 if layout.kind == "zigzag" else 1)


@given(st.integers(1, 8), st.integers(1, 40))
def test_balanced_layouts_balance_causal_work(world, per_piece):
    for kind in ("zigzag", "striped"):
        layout = Layout(kind, 0, 2 * world * per_piece, world)
        work = [sum(p + 1 for p in positions(layout.runs(rank))) for rank in range(world)]
        slack = 0 if kind == "zigzag" else 2 * world * per_piece  # one key per query
        assert max(work) - min(work) <= slack


def test_zigzag_pairs_an_early_piece_with_a_late_one():
    assert Layout("zigzag", 0, 16, 4).runs(1) == (Run(2, 4), Run(12, 14))
    assert Layout("zigzag", 0, 16, 4).runs(3) == (Run(6, 10),)


def test_ranks_may_own_nothing():
    assert [Layout("contiguous", 0, 1, 3).runs(rank) for rank in range(3)] == [(), (), (Run(0, 1),)]


def test_a_position_outside_is_refused():
    with pytest.raises(ValueError, match=r"position 16 is outside \[0, 16\)"):
        Layout("zigzag", 0, 16, 4).owner(16)


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="layout='zagzig': allowed are zigzag"):
        Layout("zagzig", 0, 16, 4)
