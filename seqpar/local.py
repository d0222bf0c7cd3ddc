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
    out, lse = into
    for tile in tiles:
        part = kv.slice(tile.k.start, tile.k.stop)
        rows = (out[:, tile.q], lse[:, :, tile.q])
        attend(q_BTHD[:, tile.q], part.k_BTHD, part.v_BTHD, tile.band, into=rows)
