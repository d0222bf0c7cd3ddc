"""Running a plan's tiles on local tensors.

B batch, T query tokens, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from localflash import KV, Band, Partial, empty_partial, from_key
from seqpar.schedule import Tile


class Attend(Protocol):
    """`localflash.attend` with scale, softcap and back end already chosen."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band | None, *, into: Partial | None = None
    ) -> Partial: ...


def accumulate_tiles(
    q_BTHD: Tensor, kv: KV, tiles: Sequence[Tile], into: Partial, attend: Attend
) -> None:
    """Accumulate each tile into the rows that it concerns."""
    for tile in tiles:
        q, rows = q_BTHD[:, tile.q], rows_of(into, tile.q)
        seen = kv.slice(tile.k.start, tile.k.stop)
        for _, start, k_BTHD, v_BTHD in seen.segments(q_BTHD.dtype):
            attend(q, k_BTHD, v_BTHD, from_key(tile.band, start), into=rows)


def attend_all(q_BTHD: Tensor, kv: KV, attend: Attend) -> Partial:
    """Every query against every key; KV of one segment takes one call, merged into nothing."""
    running: Partial | None = None
    for _, _, k_BTHD, v_BTHD in kv.segments(q_BTHD.dtype):
        running = attend(q_BTHD, k_BTHD, v_BTHD, None, into=running)
    return empty_partial(q_BTHD) if running is None else running


def rows_of(partial: Partial, rows: slice) -> Partial:
    """The part of a partial that belongs to these query tokens, without a copy."""
    out_BTHD, lse_BHT = partial
    return out_BTHD[:, rows], lse_BHT[:, :, rows]
