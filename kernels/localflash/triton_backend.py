"""Our own kernels as a back end: which of them takes a call.

B batch, Tq query rows, Tk keys, H query heads, Hkv KV heads, D head dim.
"""

import triton
from torch import Tensor

from .band import Band
from .merge import Partial
from .reference import Bands
from .triton_decode import decode
from .triton_encode import encode
from .triton_tools import device_of
from .views import DenseKV, KVView

# Up to so many rows of all heads of a group, one tile holds them and its keys are read once.
_FEW_ROWS = 64
_ENCODE_ROWS = 128


def attend(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    band: Band | None,
    scale: float,
    softcap: float | None,
    into: Partial | None,
) -> Partial:
    """`api.attend`: split over keys where rows alone would leave most of the device idle."""
    if few_rows(q_BTHD, k_BTHD.shape[2]):
        return decode(q_BTHD, DenseKV(k_BTHD, v_BTHD), band, scale, softcap, into)
    return encode(q_BTHD, k_BTHD, v_BTHD, band, scale, softcap, into)


def attend_cached(
    q_BTHD: Tensor,
    kv: KVView,
    bands: Bands,
    scale: float,
    softcap: float | None,
    into: Partial | None,
) -> Partial:
    """`api.attend_cached`, for DenseKV and PagedKV."""
    if isinstance(kv, DenseKV) and (bands is None or isinstance(bands, Band)):
        return attend(q_BTHD, kv.k_BTHD, kv.v_BTHD, bands, scale, softcap, into)
    return decode(q_BTHD, kv, bands, scale, softcap, into)


def attend_unified(
    q_BTHD: Tensor,
    kv: KVView,
    bands: Bands,
    scale: float,
    softcap: float | None,
    into: Partial | None,
    phi_H: Tensor,
) -> Partial:
    """`attend_cached` with the shifts phi_H (H,) float32 in place of maxima."""
    return decode(q_BTHD, kv, bands, scale, softcap, into, phi_H=phi_H)


def few_rows(q_BTHD: Tensor, heads_kv: int) -> bool:
    """Whether one tile holds a group's rows, or tiles of rows would fill under a quarter."""
    B, tokens, heads, _ = q_BTHD.shape
    if tokens * heads <= _FEW_ROWS * heads_kv:
        return True
    programs = B * heads * triton.cdiv(tokens, _ENCODE_ROWS)
    return 4 * programs <= device_of(q_BTHD.device).processors
