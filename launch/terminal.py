"""A terminal as it was, however a command ends that let somebody type."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ringstar.ranks import under_torchrun


@contextmanager
def terminal_as_it_was() -> Iterator[None]:
    """Put the terminal of standard input back afterwards: who edits a line sees no echo of it.

    Only by who started it from there, and has it: ranks leave that to their launcher.
    """
    before = _settings()
    try:
        yield
    finally:
        now = _settings()
        if before is not None and now is not None and now != before:
            with suppress(termios.error):
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _settings() -> list[Any] | None:
    """Of the terminal; None if there is none, or others have it."""
    try:
        typed = sys.stdin.isatty() and sys.stdout.isatty()
        if under_torchrun() or not typed or os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp():
            return None
        return termios.tcgetattr(sys.stdin)
    except (termios.error, OSError, ValueError, AttributeError):  # closed, or no file
        return None
