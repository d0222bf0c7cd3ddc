"""`launch.nproc`: the ranks of one machine, started by torch's elastic launcher.

The launcher lives in our own process, which so owns the one message and the exit status.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launch.faults import DONE, FAULT, INTERRUPTED, USER, say_line
from ringstar.errors import UserError

HOST = "127.0.0.1"
_HANDLED = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_SHUTDOWN = {signal.SIGTERM, signal.SIGINT}  # how ranks are told to end


def start_ranks(module: str, arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m module` on `nproc` ranks; returns the exit status for our own process.

    Prints one line if a rank fails: which, doing what, and why.
    """
    logging.disable(logging.ERROR)  # the launcher's own; what ranks say is not touched
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # peers of a dead rank complain
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    report = f"launch.report={store.port}:{os.getpid()}"
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        with _quiet_threads():
            elastic_launch(_config(nproc), sys.executable)("-m", module, *arguments, report)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        exits = {rank: failure.exitcode for rank, failure in error.failures.items()}
        status, line = diagnose(store, exits, nproc)
        if line:
            say_line(line)
        return status
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in handlers.items():  # the launcher leaves its own
            signal.signal(number, handler)
    return DONE


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Without Python's complaint about a thread that a signal caught while it was being started.

    The exception that ends the launcher takes such a thread off a list from which the thread then
    wants to take itself.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        starting = "thread started by" in (unraisable.err_msg or "")
        if not (starting and isinstance(unraisable.exc_value, KeyError)):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def join_launcher(report: str) -> Store:
    """A rank's connection to its launcher; from here on it dies with it.

    Raises UserError if `report` is not what a launcher writes.
    """
    port, _, pid = report.partition(":")
    if not (port.isdecimal() and pid.isdecimal()):
        raise UserError("launch.report", report, "the launcher sets this for its ranks")
    _die_with_parent(int(pid))
    return TCPStore(HOST, int(port), is_master=False, timeout=timedelta(seconds=60))


def diagnose(store: Store, exits: Mapping[int, int], ranks: int) -> tuple[int, str]:
    """The cause among everything that failed: ranks that lost a peer are only its victims.

    `exits` are the exit codes other than 0, by rank, in the order in which they were seen.
    """
    reports = {rank: _report(store, rank) for rank in range(ranks)}
    status, line = next(_causes(store, exits, reports))
    return status, line


def _causes(
    store: Store, exits: Mapping[int, int], reports: Mapping[int, tuple[int, str] | None]
) -> Iterator[tuple[int, str]]:
    """What may have happened, the most telling first."""
    killed = {rank: -code for rank, code in sorted(exits.items()) if code < 0}
    spoken = [(rank, *report) for rank, report in reports.items() if report]
    for rank, number in killed.items():
        # libraries abort a rank that lost its peer
        if number not in {*_SHUTDOWN, signal.SIGABRT}:
            yield FAULT, _killed(store, rank, number)
    for rank, status, line in spoken:
        if "lost contact" not in line:
            yield status, line if status == USER else _located(store, rank, line)
    for rank, number in killed.items():
        if number == signal.SIGABRT:
            yield FAULT, _killed(store, rank, number)
    first, code = next(iter(exits.items()))
    if code in (INTERRUPTED, -signal.SIGINT):
        yield INTERRUPTED, ""
    if code == -signal.SIGTERM:  # before the launcher told any rank to end
        yield FAULT, _killed(store, first, -code)
    for _, status, line in spoken:
        yield status, line
    yield FAULT, f"fault: rank {first} ended with status {code} during {_phase(store, first)}"


def _config(nproc: int) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{HOST}:0",
        local_addr=HOST,  # a host name that does not resolve is no obstacle
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # leaves no folder behind
        # Ctrl-C interrupts us and ends the ranks by SIGTERM: they need not be in Python for it
        # what is ignored, as by nohup, stays so
        signals_to_handle=",".join(
            number.name for number in _HANDLED if signal.getsignal(number) is not signal.SIG_IGN
        ),
    )


def _die_with_parent(pid: int) -> None:
    """Ask the kernel to end this process if its parent `pid` is killed (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != pid:  # it was killed before
        os._exit(FAULT)


def _killed(store: Store, rank: int, number: int) -> str:
    name = signal.Signals(number).name
    hint = ", perhaps for lack of memory" if number == signal.SIGKILL else ""
    return f"fault: rank {rank} was killed ({name}{hint}) during {_phase(store, rank)}"


def _located(store: Store, rank: int, line: str) -> str:
    """The line with rank and phase, unless it begins with them or ends with a note of them."""
    if f"rank {rank}" in line:
        return line
    return f"{line} (rank {rank}, during {_phase(store, rank)})"


def _phase(store: Store, rank: int) -> str:
    key = f"phase/{rank}"
    return store.get(key).decode() if store.check([key]) else "start"


def _report(store: Store, rank: int) -> tuple[int, str] | None:
    key = f"failed/{rank}"
    if not store.check([key]):
        return None
    status, line = json.loads(store.get(key))
    return status, line
