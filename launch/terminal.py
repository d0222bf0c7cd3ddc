"""A terminal as it was, however a command ends that let somebody type."""

from __future__ import annotations

import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def terminal_as_it_was() -> Iterator[None]:
    """Put the terminal of standard input back afterwards: who edits a line sees no echo of it."""
    before = _settings()
    try:
        yield
    finally:
        if before is not None and _settings() != before:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _settings() -> list[Any] | None:
    """Of the terminal; None if there is none."""
    try:
        return termios.tcgetattr(sys.stdin)
    except (termios.error, OSError, ValueError, TypeError):  # no terminal, closed, or no file
        return None
