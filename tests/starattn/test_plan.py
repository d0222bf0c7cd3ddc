"""python -m pytest tests/starattn/test_plan.py

Blocks, ranks, anchors and passes in integers.
"""

from hypothesis import given
from hypothesis import strategies as st

from localflash import pieces
from seqpar import positions, token_count
from starattn import SHARES, Blocks, make_blocks, plan_passes

SIZES = st.tuples(st.integers(1, 60), st.integers(1, 7), st.integers(1, 60), st.integers(0, 60))
CHUNKS = st.integers(1, 70)


def blocks_of(sizes) -> Blocks:
    tokens, world, block, anchor = sizes
    return make_blocks(tokens, world, block, min(anchor, block, tokens))


def seen_by(step, blocks):
    """For each token of a pass: the lane indices of its keys; told by tiles alone."""
    lane, seen = step.lane, [[] for _ in range(step.stop - step.start)]
    offsets = (
        (step.new, step.start),
        (step.past, lane.dropped - lane.at),
        (step.anchor, 0),
    )
    for tiles, offset in offsets:
        for tile in tiles:
            rows, keys = tile.q.stop - tile.q.start, tile.k.stop - tile.k.start
            for q, k, kind in pieces(rows, keys, tile.band):
                for i, row in enumerate(range(*q.indices(rows))):
                    all_keys = list(range(*k.indices(keys)))
                    visible = all_keys[: i + 1] if kind == "causal" else all_keys
                    seen[tile.q.start + row] += [tile.k.start + key + offset for key in visible]
    return seen


def wanted(step, blocks, index):
    """The same from the definition: the anchor, and the own block up to the token itself."""
    lane = step.lane
    if index < lane.dropped:
        return list(range(index + 1))
    position = lane.kept[0].start + index - lane.dropped
    block = position // blocks.size
    start = index - (position - block * blocks.size)
    anchor = range(blocks.anchor) if block else ()
    return sorted({*anchor, *range(start, index + 1)})


@given(SIZES, CHUNKS, st.sampled_from(SHARES), st.booleans())
def test_every_token_sees_its_anchor_and_its_block_once(sizes, chunk, share, is_head):
    blocks = blocks_of(sizes)
    for rank in range(blocks.world):
        for step in plan_passes(blocks, rank, share, is_head, chunk):
            seen = seen_by(step, blocks)
            for index in range(step.start, step.stop):
                assert sorted(seen[index - step.start]) == wanted(step, blocks, index)
            assert step.pairs == sum(map(len, seen))


@given(SIZES, CHUNKS, st.sampled_from(SHARES), st.booleans())
def test_every_position_is_kept_once_in_order(sizes, chunk, share, is_head):
    blocks = blocks_of(sizes)
    kept = []
    for rank in range(blocks.world):
        steps = plan_passes(blocks, rank, share, is_head, chunk)
        own = [p for step in steps for p in positions(step.kept)]
        assert own == positions(blocks.owned(rank))
        kept += own
    assert kept == list(range(blocks.tokens))


@given(SIZES, CHUNKS, st.booleans())
def test_passes_keep_to_the_chunk_but_for_the_shared_anchor(sizes, chunk, is_head):
    blocks = blocks_of(sizes)
    for share in SHARES:
        for rank in range(blocks.world):
            for step in plan_passes(blocks, rank, share, is_head, chunk):
                makes = step.shares and rank == 0
                assert step.stop - step.start <= (max(chunk, blocks.anchor) if makes else chunk)
                assert not makes or (step.made.start, step.made.stop) == (0, blocks.anchor)


@given(SIZES, CHUNKS, st.booleans())
def test_all_ranks_take_part_in_one_broadcast_or_none_does(sizes, chunk, is_head):
    blocks = blocks_of(sizes)
    for share in SHARES:
        counts = set()
        for rank in range(blocks.world):
            steps = plan_passes(blocks, rank, share, is_head, chunk)
            assert [step.shares for step in steps[1:]] == [False] * len(steps[1:])
            counts.add(sum(step.shares for step in steps))
        needed = blocks.anchor > 0 and any(blocks.of_rank(r) for r in range(1, blocks.world))
        assert counts == {int(share == "world" and needed)}


@given(SIZES)
def test_tokens_computed_are_those_of_the_paper_or_fewer(sizes):
    blocks = blocks_of(sizes)
    a = blocks.anchor
    for rank in range(blocks.world):
        own, kept = blocks.of_rank(rank), token_count(blocks.owned(rank))

        def computed(share, rank=rank):
            return sum(s.stop - s.start for s in plan_passes(blocks, rank, share, True, 99))

        behind = len([block for block in own if block])
        assert computed("world") == kept
        assert computed("rank") == kept + (a if rank and behind else 0)
        assert computed("none") == kept + a * behind
