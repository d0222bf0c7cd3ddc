"""python -m pytest tests/starattn/test_blocks.py

Blocks and their ranks, at any length and size.
"""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpar import positions
from starattn import Blocks, make_blocks, token_size


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 7))
def test_every_token_is_in_one_block_of_one_rank(tokens, size, world):
    blocks = make_blocks(tokens, world, size)
    runs = [blocks.run(block) for block in range(blocks.count)]
    assert [p for run in runs for p in run] == list(range(tokens))
    assert {len(run) for run in runs[:-1]} <= {min(size, tokens)}
    assert 1 <= len(runs[-1]) <= size
    dealt = [blocks.of_rank(rank) for rank in range(world)]
    assert [block for own in dealt for block in own] == list(range(blocks.count))
    assert dealt[0][0] == 0
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert [p for rank in range(world) for p in positions(blocks.owned(rank))] == list(
        range(tokens)
    )


def test_blocks_are_dealt_as_neighbours_and_rank_0_has_the_first():
    deal = [list(Blocks(100, 10, 10, 4).of_rank(rank)) for rank in range(4)]
    assert deal == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]
    deal = [list(Blocks(25, 10, 10, 5).of_rank(rank)) for rank in range(5)]
    assert deal == [[0], [1], [], [2], []]


def test_default_sizes():
    assert make_blocks(101, 4) == Blocks(101, 26, 26, 4)
    assert make_blocks(101, 4, anchor_size=0).anchor == 0
    assert make_blocks(3, 8) == Blocks(3, 1, 1, 8)
    assert make_blocks(50, 2, 4096) == Blocks(50, 50, 50, 2)


def test_one_block_has_no_use_for_an_anchor_and_may_be_shorter():
    assert make_blocks(50, 2, 4096, 1024) == Blocks(50, 50, 50, 2)
    assert make_blocks(50, 1, None, 1024) == Blocks(50, 50, 50, 1)
    assert make_blocks(50, 2, 4096, 0) == Blocks(50, 50, 0, 2)


@pytest.mark.parametrize(
    ("tokens", "block", "anchor", "message"),
    [
        (16384, 4, None, "block_size=4: makes 4,096 blocks of 16,384 tokens; did you mean 4K?"),
        (100, 10, 11, "anchor_size=11: is more than block_size=10"),
        (100, None, 26, "anchor_size=26: is more than a block's 25 tokens"),
        (100, 200, 201, "anchor_size=201: is more than block_size=200"),
        (100, 0, None, "block_size=0: must be at least 1"),
        (100, None, -1, "anchor_size=-1: must be at least 0"),
        (100, "4 KB", None, "block_size=4 KB: a number of tokens is needed"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tokens, block, anchor, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_blocks(tokens, 4, block, anchor)


def test_token_sizes():
    given = (4096, "4096", "4K", "4k", " 1M ")
    assert [token_size(size) for size in given] == [4096, 4096, 4096, 4096, 1024**2]
    for wrong in ("4KB", "K", "", "-1", "4.5K", "1e3", True):
        with pytest.raises(ValueError, match="as 4096 or 4K"):
            token_size(wrong)
