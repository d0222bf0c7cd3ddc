"""What everyone who is measured does, and what is known of it afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Timed:
    """What one call made of a batch of prompts: when it was asked, when each token came, which.

    `time.perf_counter` seconds; `token_s` and `ids` hold, for each prompt, a list as long as the
    answer.
    """

    asked_s: float
    token_s: list[list[float]]
    ids: list[list[int]]


class Generates(Protocol):
    """Who answers batches of prompts."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timed:
        """Exactly `new_tokens` greedy tokens to each prompt; end tokens end nothing.

        Prompts of one call have one length.
        """
        ...
