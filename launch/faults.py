"""What a run says when it ends badly: one line and an exit status."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from torch.distributed import Store

from ringstar.errors import TransportError, UserError

DONE, FAULT, USER, INTERRUPTED = 0, 1, 2, 130
ENDED = 128  # and the number of the signal that ended it


class Fault(RuntimeError):
    """A fault of the run whose message says it all: no type, no traceback needed."""


class Reporter:
    """Where this process says that it failed: its launcher's store, or standard error.

    Under raw torchrun the first rank of each machine speaks for all of it (what is wrong may be
    wrong on one alone), unless a rank has a fault of its own; under our launcher (`store`) no rank
    speaks, and the launcher makes one message of what they reported.
    """

    def __init__(self, rank: int = 0, store: Store | None = None, *, local_rank: int = 0):
        self.rank, self.store, self._first = rank, store, local_rank == 0
        self.show_traceback = False

    def say(self, status: int, line: str) -> None:
        if self.store is not None:
            key = f"failed/{self.rank}"
            self.store.set(key, json.dumps([status, line]))
            self.store.check([key])  # its answer proves that the launcher has the line
        elif self._first or status == FAULT:
            say_line(line)


def say_line(line: str) -> None:
    """One line for people on standard error, clear of a progress bar that was under way."""
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    with suppress(OSError):  # nobody reads any more
        print(f"{clear}ringstar: {' '.join(line.splitlines())}", file=sys.stderr, flush=True)


def exit_status(main: Callable[[], int], reporter: Reporter) -> int:
    """Run `main`; the status that its end calls for, with the line said if it ended badly."""
    try:
        return main()
    except KeyboardInterrupt:
        return INTERRUPTED
    except UserError as error:
        reporter.say(USER, str(error))
        return USER
    except Exception as error:
        if reporter.show_traceback:
            traceback.print_exc()
        reporter.say(FAULT, fault_line(error))
        return FAULT


def leave(status: int) -> NoReturn:
    """End now: threads and connections of a failed run must not hold the process back."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads any more
        os._exit(status)
    if status == DONE:
        sys.exit(DONE)
    os._exit(status)


def fault_line(error: BaseException) -> str:
    """What happened, with the rank and phase where they are known."""
    if isinstance(error, (TransportError, Fault)):
        return f"fault: {error}"
    lines = str(error).strip().splitlines() or [""]
    notes = getattr(error, "__notes__", [])
    where = f" ({'; '.join(notes)})" if notes else ""
    return f"fault: {type(error).__name__}: {lines[0]}{where}; launch.traceback=true shows where"
