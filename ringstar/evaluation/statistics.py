"""Intervals and tests for scores from 0 to 1, and for pairs of them on the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, pstdev

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
# up to 2¹⁴ ways to turn signs are all tried; of more, so many are drawn
_MOST_TRIED = 2**14


def wilson(mean: float, samples: int) -> tuple[float, float]:
    """Wilson's 95% interval of a rate, from its mean over `samples` scores.

    Scores that are fractions vary no more than 0/1 scores of the same mean (variance at most
    mean·(1 − mean)), so that theirs is at most too wide.
    """
    shift = _Z**2 / (2 * samples)
    spread = _Z * math.sqrt(mean * (1 - mean) / samples + (_Z / (2 * samples)) ** 2)
    whole = 1 + _Z**2 / samples
    return max(0.0, (mean + shift - spread) / whole), min(1.0, (mean + shift + spread) / whole)


def retention(
    mine: Sequence[float], exact: Sequence[float]
) -> tuple[float, float, float | None] | None:
    """mean(mine) / mean(exact) of pairs and its 95% interval; None if exact scored nothing.

    The interval comes from both Wilson intervals and the correlation of the pairs (MOVER-R; Donner
    and Zou 2012, Statistical Methods in Medical Research 21: 347–359), so that it is none of width
    0 where both scored alike throughout.  Without an upper end that is None.
    """
    own, other = fmean(mine), fmean(exact)
    if other == 0:
        return None
    (low, high), (low_other, high_other) = wilson(own, len(mine)), wilson(other, len(exact))
    rho = _correlation(mine, exact)
    down = own * other - rho * (own - low) * (high_other - other)
    up = own * other - rho * (high - own) * (other - low_other)
    # each root in the form that has no 0/0 where a factor of the other vanishes
    product = low * (2 * own - low) * high_other * (2 * other - high_other)
    above = down + math.sqrt(max(0.0, down**2 - product))
    lower = max(0.0, low * (2 * own - low) / above) if above > 0 else 0.0
    below = low_other * (2 * other - low_other)
    product = high * (2 * own - high) * below
    upper = (up + math.sqrt(max(0.0, up**2 - product))) / below if below else None
    return own / other, lower, upper


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's; 0 where either does not vary.

    One that is above 0 is lowered as Newcombe does (1998, Statistics in Medicine 17: 2635–2650,
    method 10): few pairs that always agree do not show that they always would.
    """
    spread = pstdev(a) * pstdev(b)
    if spread == 0:
        return 0.0
    mean_a, mean_b = fmean(a), fmean(b)
    together = fmean((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    if together > 0:
        together = max(0.0, together - 1 / (2 * len(a)))
    return together / spread


def paired_p(mine: Sequence[float], exact: Sequence[float]) -> float:
    """Two-sided p of pairs being alike: the sign of each difference could be the other one.

    Of 0/1 scores this is McNemar's exact test; of fractions Fisher's permutation test of the mean
    difference, exact up to 14 pairs that differ, from 16,384 drawn sign changes beyond.
    """
    differences = [a - b for a, b in zip(mine, exact, strict=True) if not math.isclose(a, b)]
    if not differences:
        return 1.0
    from scipy import stats

    if len({round(abs(d), 9) for d in differences}) == 1:
        won = sum(d > 0 for d in differences)
        return float(stats.binomtest(won, len(differences)).pvalue)
    tested = stats.permutation_test(
        (differences,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_MOST_TRIED,
        rng=0,
    )
    return float(tested.pvalue)
