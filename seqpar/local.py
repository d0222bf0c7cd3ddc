"""Running a plan's tiles on local tensors.

B batch, T query tokens, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from localflash import Band, DenseKV, Partial
from seqpar.schedule import Tile


class Attend(Protocol):
    """`localflash.attend` with scale, softcap and back end already chosen."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band | None, *, into: Partial | None = None
    ) -> Partial: ...


def accumulate_tiles(
    q_BTHD: Tensor, kv: DenseKV, tiles: Sequence[Tile], into: Partial, attend: Attend
) -> None:
    """Accumulate each tile into the rows that it concerns."""
    for tile in tiles:
        part = kv.slice(tile.k.start, tile.k.stop)
        rows = rows_of(into, tile.q)
        attend(q_BTHD[:, tile.q], part.k_BTHD, part.v_BTHD, tile.band, into=rows)


def rows_of(partial: Partial, rows: slice) -> Partial:
    """The part of a partial that belongs to these query tokens, without a copy."""
    out_BTHD, lse_BHT = partial
    return out_BTHD[:, rows], lse_BHT[:, :, rows]
