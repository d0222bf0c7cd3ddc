"""A progress bar with the time left, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def encode_bar(tokens: int, shown: bool = True) -> Iterator[Callable[[float], None]]:
    """Yields a function that takes the share of the work that is done, from 0 to 1."""
    quiet = not shown or not sys.stderr.isatty()
    with tqdm(
        total=100.0,
        desc=f"encode {tokens:,} tokens",
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed} passed, {remaining} left",
        disable=quiet,
        leave=False,
    ) as bar:

        def show(share: float) -> None:
            bar.update(100.0 * share - bar.n)

        yield show
