"""python -m pytest tests/launch/test_dead_rank.py

However a run ends, nothing of it stays behind, and one line says what happened.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import HashStore, TCPStore

from launch.ranks import _config, _quiet_threads, diagnose
from tests.support.chat import chat_folder

pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
GENERATE = ["-m", "launch.generate"]
FAULTY = "import sys; from launch.ranks import start_ranks as s; sys.exit(s('tests.launch.faulty', "
NPROC = ["launch.nproc=2"]
THREADS = ["transport=threads", "transport.world_size=2"]
# so many chunks, and so many tokens of an answer, that neither ends before it is killed
LONG = ["encode.chunk_tokens=8", "generation.max_new_tokens=100000"]
GONE_S = 30


class Run:
    """A run in its own process group, and all the processes that belong to it."""

    def __init__(self, folder: Path, *command: str):
        self.mark = uuid.uuid4().hex
        self.out, self.err = folder / "out", folder / "err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdout=out,
                stderr=err,
                env=os.environ | {"TEST_RUN": self.mark},
                start_new_session=True,
            )

    def alive(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("TEST_RUN") == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        found = {}
        for process in self.alive():
            try:
                rank = process.environ().get("RANK")
            except psutil.Error:
                continue
            if rank is not None:
                found[int(rank)] = process
        return found

    def wait_for(self, what, timeout_s: float = 120):
        """Poll until `what()` is true; returns it."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            value = what()
            if value:
                return value
            assert self.process.poll() is None, self.err.read_text()
            time.sleep(0.01)
        raise AssertionError(f"never came: {self.err.read_text()}")

    def phase(self, rank: int, beginning: str) -> psutil.Process:
        """Wait until a rank of our launcher is in a phase; returns its process."""
        ranks = self.wait_for(lambda: len(found := self.ranks()) == 2 and found)
        (report,) = [a for a in ranks[rank].cmdline() if a.startswith("launch.report=")]
        port = int(report.partition("=")[2].partition(":")[0])
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
        key = f"phase/{rank}"
        self.wait_for(lambda: store.check([key]) and store.get(key).decode().startswith(beginning))
        return ranks[rank]

    def end(self) -> tuple[int, list[str]]:
        """Status and standard error, once nothing of the run is alive any more."""
        started = time.monotonic()
        status = self.process.wait(GONE_S)
        while (left := self.alive()) and time.monotonic() - started < GONE_S:
            time.sleep(0.1)
        assert not left
        return status, self.err.read_text().splitlines()

    def kill_all(self) -> None:
        for process in self.alive():
            process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    runs = []

    def start(*command: str) -> Run:
        runs.append(Run(tmp_path, *command))
        return runs[-1]

    yield start
    for run in runs:
        run.kill_all()


@pytest.fixture(scope="session")
def long_ask(tmp_path_factory, bare) -> list[str]:
    """A document and an answer that take minutes."""
    path = tmp_path_factory.mktemp("long") / "ids.json"
    path.write_text(json.dumps({"context_ids": [1, 2, 3] * 20_000, "query_ids": [1, 2, 3]}))
    return [
        f"model.path={bare}",
        f"document.ids_path={path}",
        "model.allow_beyond_limit=true",
        *LONG,
    ]


@pytest.fixture
def short_ask(ids_file, bare) -> list[str]:
    """A document that is encoded at once, and an answer that takes minutes."""
    path = ids_file([1, 2, 3])
    allow = "model.allow_beyond_limit=true"
    return [f"model.path={bare}", f"document.ids_path={path}", allow, *LONG]


def one_fault(lines: list[str]) -> str:
    """The one line about a fault; all others are about choices."""
    assert all(line.startswith("ringstar: ") for line in lines), lines
    faults = [line for line in lines if "fault" in line]
    assert len(faults) == 1, lines
    assert faults[0] == lines[-1]
    return faults[0]


@pytest.mark.parametrize(("phase", "rank"), [("load", 1), ("encode", 0), ("decode", 1)])
def test_killed_rank_is_named(start, long_ask, short_ask, ids_file, phase, rank):
    ask = {"encode": long_ask, "decode": short_ask}.get(phase)
    if ask is None:
        deep = chat_folder(num_hidden_layers=200)
        ask = [f"model.path={deep}", f"document.ids_path={ids_file([1])}"]
    run = start(*GENERATE, *ask, *NPROC)
    run.phase(rank, phase).kill()
    status, lines = run.end()
    assert status == 1
    assert f"rank {rank} was killed (SIGKILL" in one_fault(lines)
    assert f"during {phase}" in one_fault(lines)


def test_killed_rank_under_torchrun(start, long_ask):
    run = start(*TORCHRUN, *GENERATE, *long_ask)
    run.wait_for(lambda: b"kernel" in run.err.read_bytes())
    run.ranks()[1].kill()
    status, _ = run.end()
    assert status not in (0, 130)


def test_fault_of_a_rank_is_named(start, long_ask):
    run = start("-c", f"{FAULTY}sys.argv[1:], 2))", *long_ask)
    run.process.wait(120)
    status, lines = run.end()
    assert status == 1
    line = one_fault(lines)
    assert "ZeroDivisionError: no such luck" in line
    assert "rank 1, during encode chunk 3 of 5" in line


@pytest.mark.parametrize("whom", ["group", "launcher"])
def test_interrupted_ranks(start, long_ask, whom):
    run = start(*GENERATE, *long_ask, *NPROC)
    run.phase(0, "encode chunk 3")
    send = os.killpg if whom == "group" else os.kill
    send(run.process.pid, signal.SIGINT)
    status, lines = run.end()
    assert status == 130
    assert all(line.startswith("ringstar: ") and "fault" not in line for line in lines)


def test_interrupted_threads(start, long_ask):
    run = start(*GENERATE, *long_ask, *THREADS)
    run.wait_for(lambda: b"kernel" in run.err.read_bytes())
    time.sleep(1)
    os.kill(run.process.pid, signal.SIGINT)
    status, lines = run.end()
    assert status == 130
    assert all(line.startswith("ringstar: ") and "fault" not in line for line in lines)


def test_interrupted_while_importing(start, long_ask):
    run = start(*GENERATE, *long_ask, *NPROC)
    run.wait_for(lambda: psutil.Process(run.process.pid).memory_info().rss > 40 << 20)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.end() == (130, [])


def test_terminated_launcher(start, short_ask):
    run = start(*GENERATE, *short_ask, *NPROC)
    run.wait_for(lambda: len(run.ranks()) == 2)  # which are importing still
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.end() == (128 + signal.SIGTERM, [])


def test_killed_launcher_leaves_no_ranks(start, long_ask):
    run = start(*GENERATE, *long_ask, *NPROC)
    run.phase(0, "encode chunk 3")
    run.process.kill()
    status, lines = run.end()
    assert status == -signal.SIGKILL
    assert not [line for line in lines if "Trace" in line]


def test_launcher_killed_before_its_ranks_are_up(start, long_ask):
    run = start(*GENERATE, *long_ask, *NPROC)
    run.wait_for(lambda: len(run.ranks()) == 2)
    run.process.kill()
    assert run.end()[0] == -signal.SIGKILL


def test_a_thread_caught_by_a_signal_while_it_starts_is_not_reported(monkeypatch):
    """What Python says when a thread is off the list of those that start before it runs."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: said.append(what.exc_type))
    with _quiet_threads():
        for error in (KeyError("thread"), ValueError("other")):
            _thread.start_new_thread(raising, (error,))
            time.sleep(0.2)
    assert said == [ValueError]


def raising(error):
    raise error


def test_what_is_ignored_stays_so():
    """As SIGHUP under nohup: a closed terminal ends no run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert "SIGHUP" not in _config(2).signals_to_handle
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert "SIGHUP" in _config(2).signals_to_handle
    finally:
        signal.signal(signal.SIGHUP, before)


# -- the cause among several failures, without processes ---------------------------------------


def diagnosed(exits: dict[int, int], **reports: tuple[int, str]) -> tuple[int, str]:
    store = HashStore()
    for rank in range(4):
        store.set(f"phase/{rank}", f"phase {rank}")
    for name, report in reports.items():
        store.set(f"failed/{name[1:]}", json.dumps(report))
    return diagnose(store, exits, 4)


def lost(rank: int) -> tuple[int, str]:
    return 1, f"fault: rank {rank} during encode: lost contact with another rank (closed)"


def test_a_killed_rank_comes_before_its_victims():
    status, line = diagnosed({0: 1, 1: -6, 2: -9, 3: -15}, r0=lost(0))
    assert status == 1
    assert "rank 2 was killed (SIGKILL" in line
    assert "during phase 2" in line


def test_a_fault_comes_before_its_victims():
    status, line = diagnosed({0: 1, 1: -6, 2: 1}, r0=lost(0), r2=(1, "fault: ValueError: x"))
    assert (status, line) == (1, "fault: ValueError: x (rank 2, during phase 2)")


def test_wrong_input_keeps_its_status():
    assert diagnosed({1: 2, 0: -15}, r1=(2, "model.path=x: y")) == (2, "model.path=x: y")


def test_a_rank_that_somebody_terminated():
    status, line = diagnosed({3: -15, 0: 1}, r0=lost(0))
    assert (status, line) == (1, "fault: rank 3 was killed (SIGTERM) during phase 3")


def test_lost_contact_alone_is_told():
    assert diagnosed({0: 1, 1: -15}, r0=lost(0)) == lost(0)


def test_a_rank_that_says_nothing():
    assert diagnosed({2: 7}) == (1, "fault: rank 2 ended with status 7 during phase 2")


def test_an_abort_without_other_cause():
    assert "rank 1 was killed (SIGABRT)" in diagnosed({1: -6, 0: 1}, r0=lost(0))[1]


def test_an_interrupt_has_no_line():
    assert diagnosed({0: -2}) == (130, "")
    assert diagnosed({0: 130}) == (130, "")
