"""python -m pytest tests/ringstar/test_evaluation_statistics.py

Intervals and tests against known values, other ways to compute them, and simulations.
"""

import itertools
import math

import numpy as np
import pytest

from ringstar.evaluation import paired_p, retention, wilson

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("found", "samples"), [(0, 10), (1, 1), (7, 10), (38, 40), (40, 40)])
def test_wilson_is_that_of_scipy(found, samples):
    want = stats.binomtest(found, samples).proportion_ci(method="wilson")
    assert wilson(found / samples, samples) == pytest.approx((want.low, want.high), abs=1e-12)


def test_wilson_of_fractions_lies_between():
    low, high = wilson(0.55, 10)
    assert wilson(0.5, 10)[0] < low < wilson(0.6, 10)[0]
    assert wilson(0.5, 10)[1] < high < wilson(0.6, 10)[1]


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (0, 6), (1, 7), (5, 5), (9, 2)])
def test_paired_p_of_0_and_1_is_mcnemars(won, lost):
    mine = [1] * won + [0] * lost + [1, 0, 1]
    exact = [0] * won + [1] * lost + [1, 0, 1]
    want = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert paired_p(mine, exact) == pytest.approx(want)
    assert paired_p(exact, mine) == pytest.approx(want)


def test_paired_p_of_fractions_tries_every_sign():
    mine, exact = [0.2, 0.4, 0.6, 0.5, 1.0, 0.0], [0.4, 1.0, 1.0, 1.0, 0.9, 0.0]
    differences = [a - b for a, b in zip(mine, exact, strict=True)]
    seen = abs(sum(differences)) - 1e-9
    signs = list(itertools.product((1, -1), repeat=6))
    as_far = [abs(sum(s * d for s, d in zip(sign, differences, strict=True))) for sign in signs]
    want = sum(value >= seen for value in as_far) / len(signs)
    assert paired_p(mine, exact) == pytest.approx(want)


def test_paired_p_of_many_fractions_is_reproducible_and_near_the_t_test():
    draw = np.random.default_rng(0)
    exact = draw.integers(0, 11, 60) / 10
    mine = np.clip(exact - draw.integers(-2, 4, 60) / 10, 0, 1)
    p = paired_p(mine.tolist(), exact.tolist())
    assert p == paired_p(mine.tolist(), exact.tolist())
    assert p == pytest.approx(stats.ttest_rel(mine, exact).pvalue, abs=5e-3)


def test_retention_of_what_is_known():
    alike = [1.0] * 40
    low = wilson(1, 40)[0]
    assert retention(alike, alike) == pytest.approx((1, low, 1 / low))
    assert retention([1, 0], [0, 0]) is None
    assert retention([0] * 20, [1] * 20)[:2] == (0, 0)
    assert retention([0] * 20, [1] * 20)[2] == pytest.approx(wilson(0, 20)[1] / low, rel=0.1)
    ratio, low, high = retention([1, 0, 1, 0], [1, 1, 1, 0])
    assert ratio == pytest.approx(2 / 3)
    assert 0 < low < ratio < high


def test_pairs_that_go_together_make_the_interval_narrower():
    exact = [1, 0] * 20
    together, apart = [*exact[:38], 0, 0], [0, 1] * 19 + [0, 0]
    assert sum(together) == sum(apart)
    widths = [math.dist(*([end] for end in retention(m, exact)[1:])) for m in (together, apart)]
    assert widths[0] < 0.6 * widths[1]


def test_retention_of_a_few_samples_is_finite_or_open():
    """Every way that three pairs can be: never a division by 0, never an interval beside it."""
    for scores in itertools.product([(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.25)], repeat=3):
        found = retention(*zip(*scores, strict=True))
        if found is not None:
            ratio, low, high = found
            assert 0 <= low <= ratio + 1e-12
            assert high is None or high >= ratio - 1e-12


@pytest.mark.parametrize(("both", "exact_only", "mine_only"), [(0.7, 0.2, 0.05), (0.5, 0.0, 0.1)])
def test_retention_covers_as_often_as_it_says(both, exact_only, mine_only):
    draw = np.random.default_rng(1)
    neither = 1 - both - exact_only - mine_only
    kinds = draw.choice(4, size=(800, 40), p=[both, exact_only, mine_only, neither])
    mine, exact = np.isin(kinds, (0, 2)) * 1.0, np.isin(kinds, (0, 1)) * 1.0
    true = (both + mine_only) / (both + exact_only)
    pairs = zip(mine.tolist(), exact.tolist(), strict=True)
    covered = [low <= true <= high for _, low, high in (retention(m, e) for m, e in pairs)]
    assert np.mean(covered) >= 0.94
