"""Blocks of a document and the ranks that hold them: pure integers.

Star Attention (Acharya, Jia, Ginsburg, arXiv 2411.17116), section 2: the document is cut into
blocks, and every block but the first is encoded behind an anchor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from seqpar import Run, Runs

# that small and that many, and the size was surely meant in thousands
SMALL_BLOCK, MANY_BLOCKS = 64, 256
_UNITS = {"": 1, "k": 1024, "m": 1024**2}


@dataclass(frozen=True, slots=True)
class Blocks:
    """`tokens` of a document in blocks of `size`, the last one as long as is left.

    Neighbouring blocks go to one rank; with fewer blocks than ranks some ranks have none, but
    rank 0 always has block 0.  `anchor` tokens stand before every block but the first.
    """

    tokens: int
    size: int
    anchor: int
    world: int

    @property
    def count(self) -> int:
        return -(-self.tokens // self.size)

    def run(self, block: int) -> Run:
        """The positions of `block`."""
        return Run(block * self.size, min(self.tokens, (block + 1) * self.size))

    def of_rank(self, rank: int) -> range:
        """The blocks that `rank` encodes and keeps."""
        first, last = (-(-r * self.count // self.world) for r in (rank, rank + 1))
        return range(first, last)

    def owned(self, rank: int) -> Runs:
        """The positions that `rank` keeps: one run, or none."""
        blocks = self.of_rank(rank)
        return (Run(self.run(blocks[0]).start, self.run(blocks[-1]).stop),) if blocks else ()


def make_blocks(
    tokens: int,
    world: int,
    block_size: int | str | None = None,
    anchor_size: int | str | None = None,
) -> Blocks:
    """Blocks of `block_size` (None: as many as ranks) behind `anchor_size` (None: as long).

    A document of one block has no use for an anchor, and may be shorter than the one asked for.
    ValueError begins with the name of the argument that is wrong, and its value.
    """
    block_size = _size("block_size", block_size, least=1)
    anchor_size = _size("anchor_size", anchor_size, least=0)
    size = -(-tokens // world) if block_size is None else min(block_size, tokens)
    count = -(-tokens // size)
    if size < SMALL_BLOCK and count > MANY_BLOCKS:
        raise ValueError(
            f"block_size={size}: makes {count:,} blocks of {tokens:,} tokens; did you mean"
            f" {size}K? at least {min(SMALL_BLOCK, -(-tokens // MANY_BLOCKS))} is needed"
        )
    anchor = size if anchor_size is None else anchor_size
    most = block_size if block_size is not None else size
    if anchor > most and (block_size is not None or count > 1):
        what = f"a block's {size} tokens" if block_size is None else f"block_size={block_size}"
        raise ValueError(
            f"anchor_size={anchor}: is more than {what}; allowed: from 0 (no anchor) to {most}"
        )
    return Blocks(tokens, size, min(anchor, size), world)


def _size(name: str, value: int | str | None, *, least: int) -> int | None:
    if value is None:
        return None
    try:
        tokens = token_size(value)
    except ValueError as error:
        raise ValueError(f"{name}={value}: {error}") from error
    if tokens < least:
        raise ValueError(f"{name}={value}: must be at least {least}")
    return tokens


def token_size(value: int | str) -> int:
    """Tokens from `4096`, `"4096"`, `"4K"` (4096) or `"1M"`; ValueError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = re.fullmatch(r"(\d+)([km]?)", str(value).strip().lower())
    if not found:
        raise ValueError("a number of tokens is needed, as 4096 or 4K")
    return int(found[1]) * _UNITS[found[2]]
