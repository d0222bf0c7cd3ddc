"""How far kept KV is from what was computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from localflash import KV


class Rounding:
    """Sums of squares over all that was kept, for keys and for values: of errors, of numbers."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, k_BTKD: Tensor, v_BTKD: Tensor, kept: KV) -> None:
        """`kept` is what these became; nothing waits for the device."""
        for _, start, k_BtKD, v_BtKD in kept.segments(torch.float32):
            stop = start + k_BtKD.shape[1]
            pairs = ((k_BTKD[:, start:stop], k_BtKD), (v_BTKD[:, start:stop], v_BtKD))
            sums = [
                (tensor.float().square().sum(dtype=torch.float64))
                for computed, stored in pairs
                for tensor in (stored - computed, computed)
            ]
            before = self._sums or [torch.zeros_like(each) for each in sums]
            self._sums = [a + b for a, b in zip(before, sums, strict=True)]

    def take(self) -> tuple[float, float] | None:
        """The root mean square error of keys and values over theirs, since the last call."""
        if not self._sums:
            return None
        k_error, k, v_error, v = (float(each) for each in self._sums)
        self._sums = []
        return math.sqrt(k_error / k) if k else 0.0, math.sqrt(v_error / v) if v else 0.0
