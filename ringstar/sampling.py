"""Choosing the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from ringstar.config import GenerationConfig

NO_TOKEN = -1


class Sampler:
    """Greedy, or temperature and top-p with a seed; lives on the rank that decides."""

    def __init__(self, settings: GenerationConfig):
        self._temperature, self._top_p = settings.temperature, settings.top_p
        self._generator = torch.Generator().manual_seed(int(settings.seed))

    def __call__(self, logits_V: Tensor) -> int:
        """The next token for float32 `logits_V (vocab,)`; NO_TOKEN if they are not all finite."""
        if not torch.isfinite(logits_V).all():
            return NO_TOKEN
        if self._temperature == 0:
            return int(logits_V.argmax())
        # on the CPU, so that a seed gives the same draw on every device
        below_top = logits_V.cpu().double() - logits_V.max().item()
        probs = torch.softmax(below_top / self._temperature, dim=-1)
        if self._top_p < 1:
            probs = _nucleus(probs, self._top_p)
        return int(torch.multinomial(probs, 1, generator=self._generator))


def _nucleus(probs_V: Tensor, top_p: float) -> Tensor:
    """Zero but for the fewest tokens whose probabilities reach `top_p` (Holtzman et al. 2020)."""
    ordered, order = probs_V.sort(descending=True)
    before = ordered.cumsum(0) - ordered
    return torch.zeros_like(probs_V).scatter(0, order, ordered.masked_fill(before >= top_p, 0))
