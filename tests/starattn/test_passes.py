"""python -m pytest tests/starattn/test_passes.py

The passes of phase 1 carried out on names instead of tensors: what a tile reads must lie there,
and must have been put there before.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar import positions
from starattn import SHARES, make_blocks, plan_passes


@st.composite
def plans(draw):
    tokens = draw(st.integers(1, 60))
    size = draw(st.integers(1, tokens))
    blocks = make_blocks(tokens, draw(st.integers(1, 5)), size, draw(st.integers(0, size)))
    return blocks, draw(st.sampled_from(SHARES)), draw(st.booleans()), draw(st.integers(1, 70))


def seen(tile):
    """Pairs (query, key) of local indices that a tile computes."""
    for row, i in enumerate(range(tile.q.start, tile.q.stop)):
        for column, j in enumerate(range(tile.k.start, tile.k.stop)):
            band = tile.band
            if band is None or (
                band.k_start + column * band.k_step <= band.q_start + row * band.q_step
            ):
                yield i, j


class Rank:
    """One rank's memory: ("own", position) is kept, ("anchor", place) is not."""

    def __init__(self, blocks, head_is_anchor):
        self.blocks, self.head_is_anchor = blocks, head_is_anchor
        self.kept, self.broadcasts = [], 0

    def carry_out(self, step):
        dropped = [("anchor", place) for place in step.dropped]
        tokens = dropped + [("own", position) for position in positions(step.kept)]
        self._place_anchor(step, tokens)
        found = [[] for _ in tokens]
        memory = (tokens, self.kept, self.places)
        for tiles, held in zip((step.new, step.past, step.anchor), memory, strict=True):
            for i, j in (pair for tile in tiles for pair in seen(tile)):
                found[i].append(self._as_anchor(tokens[i], held[j]))
        for token, keys in zip(tokens, found, strict=True):
            assert sorted(keys) == self._wanted(*token)
        self.kept += tokens[len(dropped) :]

    def _place_anchor(self, step, tokens):
        if step.start == step.lane.start:  # another lane has another anchor
            self.places = [None] * self.blocks.anchor
        source = "own" if self.head_is_anchor else "anchor"
        for place, token in zip(step.made, tokens, strict=False):
            assert token == (source, place)
            self.places[place] = ("anchor", place)
        self.broadcasts += step.shares
        if step.shares and step.lane.received:
            self.places = [("anchor", place) for place in range(self.blocks.anchor)]
        assert not step.shares or None not in self.places  # what is broadcast is all there

    def _as_anchor(self, token, key):
        """The head of block 0, seen from a later block, is the anchor."""
        later = token[0] == "own" and token[1] >= self.blocks.size
        return ("anchor", key[1]) if later and key < ("own", self.blocks.anchor) else key

    def _wanted(self, kind, at):
        """What a token sees, each key once: the anchor, and its block up to itself."""
        if kind == "anchor":
            return [("anchor", place) for place in range(at + 1)]
        block = at // self.blocks.size
        anchor = [("anchor", place) for place in range(self.blocks.anchor if block else 0)]
        return anchor + [("own", position) for position in range(block * self.blocks.size, at + 1)]


@settings(max_examples=300, deadline=None)
@given(plans())
def test_what_a_token_sees_is_there_once_and_was_put_there_before(plan):
    blocks, share, head, chunk_tokens = plan
    broadcasts = set()
    for number in range(blocks.world):
        rank = Rank(blocks, head and number == 0 and share != "none")
        for step in plan_passes(blocks, number, share, head, chunk_tokens):
            rank.carry_out(step)
        assert rank.kept == [("own", position) for position in positions(blocks.owned(number))]
        broadcasts.add(rank.broadcasts)
    assert len(broadcasts) == 1


def test_the_passes_by_hand():
    """Rank 1 of 2 holds blocks 2 and 3 of 10, 10, 10 and 4 tokens; anchors of 5."""
    blocks = make_blocks(34, 2, 10, 5)
    for share, sizes in (("world", [14]), ("rank", [19]), ("none", [15, 9])):
        steps = plan_passes(blocks, 1, share, True, 100)
        assert [step.stop - step.start for step in steps] == sizes
    steps = plan_passes(blocks, 1, "rank", True, 8)
    assert [(list(s.dropped), positions(s.kept)) for s in steps] == [
        ([0, 1, 2, 3, 4], [20, 21, 22]),
        ([], [*range(23, 31)]),
        ([], [31, 32, 33]),
    ]
