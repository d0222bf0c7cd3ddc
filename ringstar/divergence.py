"""How far apart two guesses of the next token are.

T positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# so many positions at once: float64 copies of all of them could be larger than the model
_ROWS = 16


def kl_divergence(exact_TV: Tensor, other_TV: Tensor) -> Tensor:
    """KL(exact ‖ other) in nats at each position: float64 (T,), never below 0.

    Both are logits (T, V) of any float dtype; the softmax is taken in float64.  It is 0 where
    both give the same probabilities, and infinite where `other` excludes (logit −inf) what
    `exact` does not.

    Raises:
        ValueError: the shapes differ, or are not (T, V).
    """
    _check_shapes(exact_TV, other_TV)
    rows = zip(exact_TV.split(_ROWS), other_TV.split(_ROWS), strict=True)
    found = [_kl(exact, other) for exact, other in rows]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)


def same_top(exact_TV: Tensor, other_TV: Tensor) -> Tensor:
    """Whether both hold the same token for the likeliest: bool (T,).

    Raises:
        ValueError: the shapes differ, or are not (T, V).
    """
    _check_shapes(exact_TV, other_TV)
    return exact_TV.argmax(-1) == other_TV.argmax(-1)


def _kl(exact_TV: Tensor, other_TV: Tensor) -> Tensor:
    exact, other = (logits.double().log_softmax(-1) for logits in (exact_TV, other_TV))
    share = exact.exp()
    # what has no probability adds nothing, though its logarithm is infinite
    terms = torch.where(share == 0, 0.0, share * (exact - other))
    return terms.sum(-1).clamp_min(0.0)  # rounding can end a little below 0


def _check_shapes(exact_TV: Tensor, other_TV: Tensor) -> None:
    if exact_TV.ndim != 2 or exact_TV.shape != other_TV.shape:
        shapes = f"{tuple(exact_TV.shape)} and {tuple(other_TV.shape)}"
        raise ValueError(
            f"logits: two of one shape (positions, vocabulary) are needed, not {shapes}"
        )
