"""Progress bars with the time left, on a terminal only."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

BAR_FORM = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} passed, {remaining} left"
# a generated token takes about as long as so many of a document
TOKENS_OF_A_STEP = 8


@contextmanager
def encode_bar(tokens: int, shown: bool = True) -> Iterator[Callable[[float], None]]:
    """Yields a function that takes the share of the work that is done, from 0 to 1."""
    quiet = not shown or not sys.stderr.isatty()
    with tqdm(
        total=100.0,
        desc=f"encode {tokens:,} tokens",
        bar_format=BAR_FORM,
        disable=quiet,
        leave=False,
    ) as bar:

        def show(share: float) -> None:
            bar.update(100.0 * share - bar.n)

        yield show


class WorkBar:
    """Counts tokens of encodes, answers and scores; what ends early counts as done."""

    def __init__(self, bar: tqdm):
        self._bar = bar

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
    def question(self, new_tokens: int) -> Iterator[None]:
        """Around an answer of at most so many tokens."""
        yield
        self._bar.update(TOKENS_OF_A_STEP * new_tokens)

    @contextmanager
    def score(self, tokens: int) -> Iterator[None]:
        """Around the score of so many tokens."""
        yield
        self._bar.update(tokens)


@contextmanager
def work_bar(what: str, work: float, shown: bool) -> Iterator[WorkBar]:
    """One bar over `work` tokens; lines that are logged meanwhile stand above it."""
    with (
        tqdm(
            desc=what,
            total=float(work),
            bar_format=BAR_FORM,
            disable=not shown or not sys.stderr.isatty(),
            leave=False,
        ) as bar,
        logging_redirect_tqdm([logging.getLogger("ringstar")]),
    ):
        yield WorkBar(bar)
