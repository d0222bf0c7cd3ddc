"""python -m pytest tests/ringstar/test_divergence.py

KL divergence and top-1 agreement against values worked out by hand, and what always holds.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringstar.divergence import kl_divergence, same_top

LOGIT = st.floats(-30, 30, width=32)


@st.composite
def two_rows(draw):
    vocab = draw(st.integers(1, 12))
    rows = st.lists(LOGIT, min_size=vocab, max_size=vocab)
    return torch.tensor([draw(rows)]), torch.tensor([draw(rows)])


def logs(*shares: float) -> torch.Tensor:
    return torch.tensor([[math.log(share) for share in shares]])


def test_values_worked_out_by_hand():
    half, tilted = logs(0.5, 0.5), logs(0.75, 0.25)
    # 0.5 ln(0.5 / 0.75) + 0.5 ln(0.5 / 0.25) = 0.5 ln(4 / 3)
    assert kl_divergence(half, tilted).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    # 0.75 ln(0.75 / 0.5) + 0.25 ln(0.25 / 0.5): it is not symmetric
    want = 0.75 * math.log(1.5) - 0.25 * math.log(2)
    assert kl_divergence(tilted, half).item() == pytest.approx(want, rel=1e-6)


def test_rows_do_not_mix_and_come_in_order():
    torch.manual_seed(0)
    exact, other = torch.randn(2, 41, 7)
    whole = kl_divergence(exact, other)
    assert whole.shape == (41,)
    assert whole.dtype == torch.float64
    for row in range(41):
        alone = kl_divergence(exact[row : row + 1], other[row : row + 1])
        assert alone.item() == pytest.approx(whole[row].item(), rel=1e-12)


def test_excluded_tokens():
    none, both = torch.tensor([[0.0, -math.inf]]), torch.zeros(1, 2)
    assert kl_divergence(none, both).item() == pytest.approx(math.log(2))
    assert kl_divergence(both, none).item() == math.inf
    assert kl_divergence(none, none).item() == 0


@settings(deadline=None, max_examples=200)
@given(two_rows())
def test_never_negative_and_zero_for_itself(rows):
    exact, other = rows
    assert kl_divergence(exact, other).item() >= 0
    assert kl_divergence(exact, exact).item() == 0


@settings(deadline=None, max_examples=200)
@given(two_rows(), st.floats(-100, 100), st.floats(-100, 100))
def test_adding_to_all_logits_changes_nothing(rows, a, b):
    exact, other = (row.double() for row in rows)
    shifted = kl_divergence(exact + a, other + b)
    assert torch.allclose(shifted, kl_divergence(exact, other), rtol=1e-9, atol=1e-11)
    assert same_top(exact, exact + a) or exact.topk(min(2, exact.shape[1])).values.diff() > -1e-9


def test_what_is_no_number_stays_none():
    broken = torch.tensor([[0.0, torch.nan, 1.0]])
    assert kl_divergence(broken, torch.zeros(1, 3)).isnan().all()
    assert kl_divergence(torch.zeros(1, 3), broken).isnan().all()


def test_top_tokens():
    exact = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    other = torch.tensor([[0.0, 9.0], [0.0, 1.0], [5.0, 6.0]])
    assert same_top(exact, other).tolist() == [True, False, True]


def test_no_positions():
    empty = torch.empty(0, 5)
    assert kl_divergence(empty, empty).tolist() == []
    assert same_top(empty, empty).tolist() == []


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((1, 3), (2, 3)), ((3,), (3,))])
@pytest.mark.parametrize("function", [kl_divergence, same_top])
def test_shapes_that_do_not_belong_together(function, shapes):
    with pytest.raises(ValueError, match="one shape"):
        function(*(torch.zeros(shape) for shape in shapes))
