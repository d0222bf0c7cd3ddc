"""Any band from a kernel that only knows full tiles and square causal ones.

B batch, T tokens, H query heads, Hkv KV heads, D head dim; lse natural log.
"""

from typing import Protocol

from torch import Tensor

from .band import Band, Kind, Piece, pieces
from .merge import Partial, empty_partial, merge_into


class Tile(Protocol):
    """One kernel call on non-empty tensors: full, or causal with as many rows as keys.

    Gives out (B, Tq, H, D) in any floating dtype and lse (B, H, Tq), natural log; every row
    sees a key.
    """

    def __call__(
        self, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, causal: bool, scale: float
    ) -> Partial: ...


def attend_tiles(
    tile: Tile,
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    band: Band | None,
    scale: float,
    into: Partial | None,
) -> Partial:
    """The band piece by piece, merged in float32; `into` is accumulated in place."""
    plan = pieces(q_BTHD.shape[1], k_BTHD.shape[1], band) if q_BTHD.numel() else ()
    fresh = empty_partial(q_BTHD) if into is None and not _whole(plan, q_BTHD) else into
    for q, k, kind in plan:
        part = _call(tile, q_BTHD[:, q], k_BTHD[:, k], v_BTHD[:, k], kind, scale)
        if fresh is None:  # one piece covers every row: nothing to merge with
            return part[0].to(part[1].dtype), part[1].contiguous()
        merge_into(fresh[0][:, q], fresh[1][:, :, q], *part)
    assert fresh is not None
    return fresh


def _whole(plan: tuple[Piece, ...], q_BTHD: Tensor) -> bool:
    rows = q_BTHD.shape[1]
    return len(plan) == 1 and len(range(*plan[0].q.indices(rows))) == rows


def _call(
    tile: Tile, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, kind: Kind, scale: float
) -> Partial:
    if kind != "anticausal":
        return tile(q_BTHD, k_BTHD, v_BTHD, kind == "causal", scale)
    # Backwards, "key not before the row" reads "key not after the row".
    out_BTHD, lse_BHT = tile(q_BTHD.flip(1), k_BTHD.flip(1), v_BTHD.flip(1), True, scale)
    return out_BTHD.flip(1), lse_BHT.flip(2)
