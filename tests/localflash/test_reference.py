# python -m pytest tests/localflash/test_reference.py -q
"""The specification against its formula, written out in Python's own floats."""

import math

import pytest
import torch

from localflash import Band, attend_reference

TQ, TK, H, HKV, D = 4, 5, 4, 2, 3


def by_hand(q, k, v, band, scale, softcap, h, i):
    """Row i of head h: (out, lse)."""
    scores = {}
    for j in range(TK):
        s, p = band.q_start + i * band.q_step, band.k_start + j * band.k_step
        if p <= s and (band.window is None or p > s - band.window):
            dot = sum(q[i][h][d] * k[j][h // (H // HKV)][d] for d in range(D)) * scale
            scores[j] = dot if softcap is None else softcap * math.tanh(dot / softcap)
    if not scores:
        return [0.0] * D, -math.inf
    total = sum(math.exp(x) for x in scores.values())
    weights = {j: math.exp(x) / total for j, x in scores.items()}
    out = [sum(w * v[j][h // (H // HKV)][d] for j, w in weights.items()) for d in range(D)]
    return out, math.log(total)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("scale", [None, 0.9])
@pytest.mark.parametrize("band", [Band(1, 1, 0, 1), Band(-1, 3, 0, 2, 4)])
def test_the_reference_is_its_formula(band, scale, softcap):
    torch.manual_seed(0)
    q = torch.randn(1, TQ, H, D, dtype=torch.float64)
    k, v = (torch.randn(1, TK, HKV, D, dtype=torch.float64) for _ in range(2))
    out, lse = attend_reference(q, k, v, band, scale, softcap)
    assert out.dtype == lse.dtype == torch.float64
    for h in range(H):
        for i in range(TQ):
            factor = D**-0.5 if scale is None else scale
            lists = [x[0].tolist() for x in (q, k, v)]
            want = by_hand(*lists, band, factor, softcap, h, i)
            assert out[0, i, h].tolist() == pytest.approx(want[0], abs=1e-12)
            assert lse[0, h, i].item() == pytest.approx(want[1], abs=1e-12)
