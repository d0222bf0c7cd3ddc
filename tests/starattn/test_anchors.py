"""python -m pytest tests/starattn/test_anchors.py

Every kind of anchor before every block of one document, by the rules.
"""

import pytest

from seqpar import Run
from starattn import CONTENTS, POSITIONS, Anchor, make_blocks

VOCAB, SIZE, TOKENS = 97, 20, 15
IDS = [(7 * token + token // 9) % VOCAB for token in range(100)]
BLOCKS = make_blocks(100, 3, SIZE, TOKENS)


def ids_of(block, anchor):
    return anchor.token_ids(block, BLOCKS, IDS, VOCAB)


@pytest.mark.parametrize("positions", POSITIONS)
def test_contents_do_not_depend_on_where_they_stand(positions):
    for block in range(1, 5):
        first = SIZE * (block - 1)
        assert ids_of(block, Anchor("first", positions)) == IDS[:TOKENS]
        previous = ids_of(block, Anchor("previous", positions))
        assert previous == IDS[first : first + TOKENS]
        for content in ("shuffled", "random", "constant"):
            assert ids_of(block, Anchor(content, positions)) == ids_of(1, Anchor(content))


@pytest.mark.parametrize("content", CONTENTS)
def test_positions_depend_on_the_content_only_where_they_are_its_own(content):
    for block in range(1, 5):
        previous = Run(SIZE * (block - 1), SIZE * (block - 1) + TOKENS)
        assert Anchor(content, "previous").run(block, BLOCKS) == previous
        own = previous if content == "previous" else Run(0, TOKENS)
        assert Anchor(content, "own").run(block, BLOCKS) == own
        drawn = Anchor(content, "random").run(block, BLOCKS)
        assert drawn == Anchor(positions="random").run(block, BLOCKS)
        assert (len(drawn), drawn.step) == (TOKENS, 1)
        assert 0 <= drawn.start <= SIZE * block - TOKENS


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("content", CONTENTS)
def test_an_anchor_can_be_shared_if_it_is_the_same_for_all_blocks(content, positions):
    anchor = Anchor(content, positions)
    made = {(tuple(ids_of(block, anchor)), anchor.run(block, BLOCKS)) for block in range(1, 5)}
    assert (anchor.of_block is None) == (len(made) == 1)
    assert anchor.is_head == (made == {(tuple(IDS[:TOKENS]), Run(0, TOKENS))})
