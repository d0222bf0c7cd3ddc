"""Ctrl-C while a command is importing, which takes seconds; this file imports nothing heavy."""

from __future__ import annotations

import os
import signal


def quiet_interrupts() -> None:
    """Ctrl-C ends this process without a word, until `launch.start.run_program` hears it.

    A rank stays with what the system does: it waits in native code, where Python would not hear it.
    """
    quiet = signal.SIG_DFL if "RANK" in os.environ else lambda *_: os._exit(130)
    signal.signal(signal.SIGINT, quiet)
