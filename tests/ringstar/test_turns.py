"""python -m pytest tests/ringstar/test_turns.py"""

from hypothesis import given
from hypothesis import strategies as st

from ringstar.passes import turn_runs
from seqpar import positions, token_count


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
