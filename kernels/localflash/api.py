"""The two entry points: attention to given keys, and to cached ones.

B batch, Tq query rows, Tk keys, H query heads, Hkv KV heads (H % Hkv == 0), D head dim.
out (B, Tq, H, D) and lse (B, H, Tq) are float32 (float64 for float64 inputs); lse is a natural
log; a row that sees no key has out 0, lse -inf.
"""

import math

import torch
from torch import Tensor

from .backends import Attend, Backend, choose
from .band import Band, from_key
from .merge import Partial, accumulator_dtype, empty_partial
from .reference import Bands
from .views import KVView, Segment

UNIFIED_IN_FLOAT16 = (
    "in float16 weights that are far below the shift would vanish; allowed in bfloat16 and float32"
)


def attend(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    band: Band | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    into: Partial | None = None,
    backend: str | Backend | None = None,
) -> Partial:
    """softmax(q k^T * scale) v over the keys that `band` shows (None: all), and its logsumexp.

    q (B, Tq, H, D); k, v (B, Tk, Hkv, D) in q's dtype and on its device; strides are free.
    scale defaults to D**-0.5; softcap c makes a score s into c*tanh(s/c). With `into=(out, lse)`
    the result is merged into that pair in place, and the pair is returned. backend: a name for
    `choose`, or one that is known to run this.
    ValueError names an argument that does not fit.
    """
    scale = _check(q_BTHD, scale, softcap, into)
    _check_band("band", band)
    _check_kv(q_BTHD, k_BTHD, v_BTHD)
    chosen = _backend(q_BTHD, softcap, backend)
    return chosen.attend(q_BTHD, k_BTHD, v_BTHD, band, scale, softcap, into)


def attend_cached(
    q_BTHD: Tensor,
    kv: KVView,
    bands: Bands = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    into: Partial | None = None,
    phi: Tensor | None = None,
    backend: str | Backend | None = None,
) -> Partial:
    """`attend` to the cached tokens of each sequence; token t of a sequence is key index t.

    bands: one Band (or None: all visible) for every sequence, or a list with one for each.
    phi (H,) float32: unified max, for back ends that have it: a shift of each query head's scores
    near their logsumexp, in place of their maxima; the result is the same, and rows for which it
    is too far off are computed again.
    """
    scale = _check(q_BTHD, scale, softcap, into)
    if kv.batch != q_BTHD.shape[0]:
        raise ValueError(f"kv has {kv.batch} sequences: must be {q_BTHD.shape[0]}, like q")
    _check_bands(bands, kv.batch)
    chosen = _backend(q_BTHD, softcap, backend)
    if phi is not None:
        _check_phi(q_BTHD, phi, chosen)
        assert chosen.attend_unified is not None
        return chosen.attend_unified(q_BTHD, kv, bands, scale, softcap, into, phi)
    if chosen.attend_cached is not None:
        return chosen.attend_cached(q_BTHD, kv, bands, scale, softcap, into)
    return _by_segment(chosen.attend, q_BTHD, kv, bands, scale, softcap, into)


def _by_segment(
    attend_dense: Attend,
    q_BTHD: Tensor,
    kv: KVView,
    bands: Bands,
    scale: float,
    softcap: float | None,
    into: Partial | None,
) -> Partial:
    segments = [part for s in kv.segments(q_BTHD.dtype) for part in _by_band(s, bands)]
    whole = len(segments) == 1 and segments[0][0].k_BTHD.shape[0] == q_BTHD.shape[0]
    running = empty_partial(q_BTHD) if into is None and not whole else into
    for (batch, start, k_BTHD, v_BTHD), band in segments:
        q = q_BTHD[batch]
        _check_kv(q, k_BTHD, v_BTHD)
        rows = None if running is None else (running[0][batch], running[1][batch])
        part = attend_dense(q, k_BTHD, v_BTHD, from_key(band, start), scale, softcap, rows)
        if running is None:  # the only segment
            return part
    assert running is not None
    return running


def _by_band(segment: Segment, bands: Bands) -> list[tuple[Segment, Band | None]]:
    """The segment with its band; sequence by sequence if each has its own."""
    if bands is None or isinstance(bands, Band):
        return [(segment, bands)]
    batch, start, k_BTHD, v_BTHD = segment
    return [
        (Segment(slice(b, b + 1), start, k_BTHD[i : i + 1], v_BTHD[i : i + 1]), bands[b])
        for i, b in enumerate(range(batch.start, batch.stop))
    ]


def _backend(q_BTHD: Tensor, softcap: float | None, name: str | Backend | None) -> Backend:
    if isinstance(name, Backend):
        return name
    device, dtype, dim = q_BTHD.device, q_BTHD.dtype, q_BTHD.shape[3]
    return choose(name, device=device, dtype=dtype, head_dim=dim, softcap=softcap).backend


def _check(
    q_BTHD: Tensor, scale: float | None, softcap: float | None, into: Partial | None
) -> float:
    """Everything but keys, values and bands; gives the scale."""
    if q_BTHD.ndim != 4 or q_BTHD.shape[3] < 1:
        raise ValueError(f"q is {tuple(q_BTHD.shape)}: must be (B, Tq, H, D) with D at least 1")
    if not q_BTHD.is_floating_point():
        raise ValueError(f"q has dtype {q_BTHD.dtype}: must be floating point")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap}: must be positive and finite, or None")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale={scale}: must be finite, or None for D**-0.5")
    if into is not None:
        _check_into(q_BTHD, into)
    return q_BTHD.shape[3] ** -0.5 if scale is None else scale


def _check_phi(q_BTHD: Tensor, phi_H: Tensor, chosen: Backend) -> None:
    if q_BTHD.dtype == torch.float16:
        raise ValueError(f"phi: {UNIFIED_IN_FLOAT16}")
    if chosen.attend_unified is None:
        raise ValueError(f"phi: kernel {chosen.name} has no unified max; allowed with triton")
    heads = q_BTHD.shape[2:3]
    if phi_H.shape != heads or phi_H.dtype != torch.float32 or phi_H.device != q_BTHD.device:
        got = f"{tuple(phi_H.shape)} {phi_H.dtype} on {phi_H.device}"
        raise ValueError(f"phi is {got}: must be {tuple(heads)} float32 on {q_BTHD.device}")


def _check_into(q_BTHD: Tensor, into: Partial) -> None:
    B, T, H, _ = q_BTHD.shape
    dtype = accumulator_dtype(q_BTHD.dtype)
    for name, x, shape in (("out", into[0], q_BTHD.shape), ("lse", into[1], (B, H, T))):
        if x.shape != shape or x.dtype != dtype or x.device != q_BTHD.device:
            got = f"{tuple(x.shape)} {x.dtype} on {x.device}"
            want = f"{tuple(shape)} {dtype} on {q_BTHD.device}"
            raise ValueError(f"into's {name} is {got}: must be {want}")


def _check_band(name: str, band: object) -> None:
    if band is not None and not isinstance(band, Band):
        raise ValueError(f"{name} holds a {type(band).__name__}: must be a Band or None")


def _check_bands(bands: Bands, batch: int) -> None:
    each = (bands,) if bands is None or isinstance(bands, Band) else bands
    for band in each:
        _check_band("bands", band)
    if each is bands and len(each) != batch:
        raise ValueError(f"bands has {len(each)} entries: must be one per sequence, {batch}")


def _check_kv(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> None:
    B, _, H, D = q_BTHD.shape
    if k_BTHD.ndim != 4 or k_BTHD.shape[0] != B or k_BTHD.shape[3] != D:
        raise ValueError(f"k is {tuple(k_BTHD.shape)}: must be ({B}, Tk, Hkv, {D}), like q")
    if v_BTHD.shape != k_BTHD.shape:
        raise ValueError(f"v is {tuple(v_BTHD.shape)}: must be {tuple(k_BTHD.shape)}, like k")
    heads_kv = k_BTHD.shape[2]
    if heads_kv < 1 or H % heads_kv:
        raise ValueError(f"k has {heads_kv} heads: must divide q's {H}")
    for name, x in (("k", k_BTHD), ("v", v_BTHD)):
        if x.dtype != q_BTHD.dtype or x.device != q_BTHD.device:
            want = f"{q_BTHD.dtype} on {q_BTHD.device}"
            raise ValueError(f"{name} is {x.dtype} on {x.device}: must be {want}, like q")
