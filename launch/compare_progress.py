"""One progress bar over all encodes and questions of a comparison, on a terminal only."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from launch.compare_plan import Plan
from ringstar.config import ComparisonConfig

# a generated token takes about as long as so many of a document
_TOKENS_OF_A_STEP = 8


class WorkBar:
    """Counts tokens of encodes, answers and scores; what ends early counts as done."""

    def __init__(self, bar: tqdm, new_tokens: int):
        self._bar, self._answer = bar, _TOKENS_OF_A_STEP * new_tokens

    @contextmanager
    def encode(self, label: str, tokens: int) -> Iterator[Callable[[float], None]]:
        """Yields a function that takes the share of the encode that is done."""
        self._bar.set_description_str(label)
        start = self._bar.n

        def show(share: float) -> None:
            self._bar.update(start + share * tokens - self._bar.n)

        yield show
        show(1.0)

    @contextmanager
    def question(self) -> Iterator[None]:
        """Around an answer."""
        yield
        self._bar.update(self._answer)

    @contextmanager
    def score(self, tokens: int) -> Iterator[None]:
        """Around the score of so many tokens."""
        yield
        self._bar.update(tokens)


@contextmanager
def work_bar(plan: Plan, config: ComparisonConfig, shown: bool) -> Iterator[WorkBar]:
    """A bar with the time left; lines that are logged meanwhile stand above it."""
    new_tokens = config.generation.max_new_tokens
    loggers = [logging.getLogger("ringstar")]
    with (
        tqdm(
            desc="compare",
            total=float(_work(plan, new_tokens)),
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed} passed, {remaining} left",
            disable=not shown or not sys.stderr.isatty(),
            leave=False,
        ) as bar,
        logging_redirect_tqdm(loggers),
    ):
        yield WorkBar(bar, new_tokens)


def _work(plan: Plan, new_tokens: int) -> int:
    """In tokens of a document, for all settings."""
    tokens = len(plan.document) + sum(len(haystack.ids) for haystack in plan.haystacks)
    asked = len(plan.questions) + sum(len(haystack.needles) for haystack in plan.haystacks)
    scored = sum(len(question.ids) + new_tokens for question in plan.questions)
    scored += sum(len(passage.ids) for passage in plan.passages)
    one = tokens + asked * _TOKENS_OF_A_STEP * new_tokens + scored
    return one * len(plan.settings)
