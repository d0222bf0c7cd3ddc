"""What stands before a block: which tokens, at which positions.

The paper's anchor is the head of block 0 at its own positions.  Everything else is one of its
ablations (arXiv 2411.17116, section 4 and table 4), kept to be measured.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from seqpar import Run
from starattn.blocks import Blocks

Content = Literal["first", "previous", "shuffled", "random", "constant"]
Positions = Literal["own", "previous", "random"]
CONTENTS: tuple[str, ...] = get_args(Content)
POSITIONS: tuple[str, ...] = get_args(Positions)


@dataclass(frozen=True, slots=True)
class Anchor:
    """The kind of anchor, for `blocks.anchor` = a tokens before block i.

    content: `first`, tokens 0..a−1; `previous`, the first a tokens of block i − 1; `shuffled`,
    those of `first` in another order; `random`, ids drawn from the vocabulary; `constant`,
    `token` again and again (None: the document's most frequent).
    positions: `own`, those that the content came from (or stands for); `previous`, those of the
    first a tokens of block i − 1; `random`, a run that is drawn anew for each block from what
    lies before it.
    """

    content: Content = "first"
    positions: Positions = "own"
    token: int | None = None
    seed: int = 0

    @property
    def is_head(self) -> bool:
        """Whether it is the beginning of block 0 itself, whose KV rank 0 has anyway."""
        return self.content == "first" and self.positions == "own"

    @property
    def of_block(self) -> str | None:
        """Why it differs from block to block, and so cannot be shared; None if it does not."""
        if self.content == "previous":
            return "anchor_content=previous"
        return None if self.positions == "own" else f"anchor_positions={self.positions}"

    def run(self, block: int, blocks: Blocks) -> Run:
        """The positions of the anchor before `block`."""
        start = 0
        if self.positions == "random":
            last = blocks.run(block).start - blocks.anchor
            start = random.Random(f"{self.seed} {block}").randint(0, last)
        elif "previous" in (self.positions, self.content):
            start = blocks.run(block - 1).start
        return Run(start, start + blocks.anchor)

    def token_ids(
        self, block: int, blocks: Blocks, ids: Sequence[int], vocab_size: int
    ) -> list[int]:
        """The token ids of the anchor before `block` of the document `ids`."""
        draw, size = random.Random(self.seed), blocks.anchor
        if self.content == "random":
            return [draw.randrange(vocab_size) for _ in range(size)]
        if self.content == "constant":
            token = Counter(ids).most_common(1)[0][0] if self.token is None else self.token
            return [token] * size
        start = blocks.run(block - 1).start if self.content == "previous" else 0
        head = list(ids[start : start + size])
        if self.content == "shuffled":
            draw.shuffle(head)
        return head
