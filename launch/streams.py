"""What reaches standard output and standard error while a command runs."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from launch.faults import Fault, say_line
from ringstar.errors import reason


def show_choices() -> None:
    """Let rank 0's choices reach standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("ringstar: %(message)s"))
    logger = logging.getLogger("ringstar")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


@contextmanager
def choices_unsaid() -> Iterator[None]:
    """Without what rank 0 chooses meanwhile: where it is another for each text, nothing to say."""
    logger = logging.getLogger("ringstar")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def print_every_letter() -> None:
    """A letter that standard output cannot show is replaced, and ends no run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def print_piece(piece: str, *, kept: bool = True) -> None:
    """Print at once; a pipe that nobody reads any more ends no run, nor does a disk that is full.

    The latter does, with a Fault, if what is printed is not `kept` elsewhere.
    """
    try:
        print(piece, end="", flush=True)
    except OSError as error:
        why = f"standard output cannot be written: {reason(error)}"
        if not kept and not isinstance(error, BrokenPipeError):
            raise Fault(why) from error
        if not isinstance(error, BrokenPipeError):
            say_line(why)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_streams() -> None:
    """Streams that were closed from outside lead nowhere, and what is read there is empty."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - as long as the process
