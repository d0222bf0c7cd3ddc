"""KV in 8 bits a number, with a scale for each token and KV head.

B sequences, T tokens, H KV heads, D head dim.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .views import WIDEN_TOKENS, WIDEN_TOKENS_ON_GPU, Segment, TensorsKV

# what numbers are kept in, and the largest one that a scale is chosen for
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_BF16_DIGITS = 8  # binary, of a significand


@dataclass(frozen=True, slots=True)
class QuantKV(TensorsKV):
    """A number is its stored value times the scale of its token and KV head.

    k, v (B, T, H, D) int8 or float8_e4m3fn; k_scale, v_scale (B, T, H) bfloat16; strides free.
    `quantise` makes it. ValueError for other dtypes or shapes.
    """

    k_BTHD: Tensor
    v_BTHD: Tensor
    k_scale_BTH: Tensor
    v_scale_BTH: Tensor

    def __post_init__(self) -> None:
        _check_storage(self.k_BTHD.dtype)
        for name, values, scale in (
            ("k", self.k_BTHD, self.k_scale_BTH),
            ("v", self.v_BTHD, self.v_scale_BTH),
        ):
            if values.shape != self.k_BTHD.shape or values.dtype != self.k_BTHD.dtype:
                want = f"{tuple(self.k_BTHD.shape)} {self.k_BTHD.dtype}, like k"
                got = f"{tuple(values.shape)} {values.dtype}"
                raise ValueError(f"{name} is {got}: must be {want}")
            if scale.shape != values.shape[:3] or scale.dtype != torch.bfloat16:
                want = f"{tuple(values.shape[:3])} torch.bfloat16"
                got = f"{tuple(scale.shape)} {scale.dtype}"
                raise ValueError(f"{name}_scale is {got}: must be {want}")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.k_BTHD, self.v_BTHD, self.k_scale_BTH, self.v_scale_BTH

    def segments(self, dtype: torch.dtype) -> Iterator[Segment]:
        step = WIDEN_TOKENS_ON_GPU if self.k_BTHD.is_cuda else WIDEN_TOKENS
        for start in range(0, self.tokens if self.batch else 0, step):
            part = self.slice(start, start + step)
            k_BTHD = _widened(part.k_BTHD, part.k_scale_BTH, dtype)
            v_BTHD = _widened(part.v_BTHD, part.v_scale_BTH, dtype)
            yield Segment(slice(0, self.batch), start, k_BTHD, v_BTHD)


def quantise(k_BTHD: Tensor, v_BTHD: Tensor, storage: torch.dtype) -> QuantKV:
    """k and v (B, T, H, D), floating point, in 8 bits: `storage` is int8 or float8_e4m3fn.

    Each row of D numbers has a scale: its largest magnitude divided by the largest value of the
    storage (127 or 448), rounded to bfloat16 before the row is divided by it, so that its rounding
    adds no error. Values are rounded to the nearest. A number is off by at most half a scale in
    int8; in float8 by 1/16 of itself, or by 1/1024 of a scale if that is more. Rows of zeros
    stay exact zeros.

    What finite numbers widen to is finite in their own dtype. Scales below 1e-38 are subnormal
    and lose digits: of a row all below 1e-36 less is right, and what is below 1e-38 may become 0.
    A row with a number that is not finite (in float32, for float64 input) has scale nan and widens
    to nan as a whole: a fault upstream stays visible. ValueError for another `storage`.
    """
    _check_storage(storage)
    (k, k_scale), (v, v_scale) = (_quantised(x, storage) for x in (k_BTHD, v_BTHD))
    return QuantKV(k, v, k_scale, v_scale)


def _quantised(x_BTHD: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    wide_BTHD, largest = x_BTHD.float(), _LARGEST[storage]
    amax_BTH = torch.linalg.vector_norm(wide_BTHD, torch.inf, dim=-1)
    scale_BTH = (amax_BTH / largest).to(torch.bfloat16).clamp_max(_ceiling(x_BTHD.dtype, largest))
    scale_BTH = scale_BTH.masked_fill(~amax_BTH.isfinite(), torch.nan)
    # by a scale of 0 or nan: nothing that is stored would matter, but let it be the same always
    values = (wide_BTHD / scale_BTH.float().unsqueeze(-1)).nan_to_num_(0.0, 0.0, 0.0)
    values = values.clamp_(-largest, largest)
    if not storage.is_floating_point:  # conversion to integers truncates
        values = values.round_()
    return values.to(storage), scale_BTH


@lru_cache(maxsize=8)
def _ceiling(dtype: torch.dtype, largest: float) -> float:
    """The largest bfloat16 scale of which `largest` times as much is finite in `dtype`.

    The scale of the largest numbers of all could otherwise be rounded up to more than that.
    """
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / largest
    fraction, exponent = math.frexp(limit)
    return math.ldexp(math.floor(math.ldexp(fraction, _BF16_DIGITS)), exponent - _BF16_DIGITS)


def _widened(x_BTHD: Tensor, scale_BTH: Tensor, dtype: torch.dtype) -> Tensor:
    # exact in float32, which has room for the digits of both, and so rounded once
    return x_BTHD.float().mul_(scale_BTH.float().unsqueeze(-1)).to(dtype)


def _check_storage(storage: torch.dtype) -> None:
    if storage not in _LARGEST:
        allowed = ", ".join(str(dtype) for dtype in _LARGEST)
        raise ValueError(f"storage={storage}: allowed are {allowed}")
