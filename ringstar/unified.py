"""Unified max: one shift for each layer and head in place of maxima that splits exchange.

Source: FlashDecoding++ (Hong et al., arXiv 2311.01282, section 3), with the shift taken from the
lse of the last step, not from statistics of a model gathered beforehand.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import localflash
from localflash import Backend, Band, DenseKV, Partial
from seqpar import Attend


class UnifiedMax:
    """What one rank knows of each layer's scores; the result does not depend on it."""

    def __init__(self) -> None:
        self._phi_of_layer: dict[int, Tensor] = {}

    def of(self, layer: int, kernel: str | Backend, scale: float, softcap: float | None) -> Attend:
        """`localflash.attend` with the layer's shift, which it brings up to date."""
        attend = partial(localflash.attend_cached, scale=scale, softcap=softcap, backend=kernel)
        return partial(self._attend, layer, attend)

    def _attend(
        self,
        layer: int,
        attend_cached: partial[Partial],
        q_BTHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        band: Band | None,
        *,
        into: Partial | None = None,
    ) -> Partial:
        phi_H = self._phi_of_layer.get(layer)
        part = attend_cached(q_BTHD, DenseKV(k_BTHD, v_BTHD), band, into=into, phi=phi_H)
        self._phi_of_layer[layer] = _median(part[1], phi_H)
        return part


def _median(lse_BHT: Tensor, before_H: Tensor | None) -> Tensor:
    """The median over rows that saw a key, for each head; nothing is read back to the host."""
    seen_HR = lse_BHT.transpose(0, 1).flatten(1)
    median_H = seen_HR.masked_fill(seen_HR == -torch.inf, torch.nan).nanmedian(1).values
    fallback_H = torch.zeros_like(median_H) if before_H is None else before_H
    return torch.where(median_H.isnan(), fallback_H, median_H)
