"""One peer in a process of its own, with all cores or one GPU.

`python -m launch.bench` starts it for each; what is measured goes to bench.cells.
"""

from __future__ import annotations

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

import os
from typing import Any

from launch.bench.cells import Measured, add_line, measured
from launch.bench.measure import timed_calls
from launch.bench.peers import PEERS
from launch.bench.plan import own_device, request_of
from launch.bench.ranks import check_request
from launch.options import BENCH
from launch.start import RankCommand, run_program
from ringstar.config import BenchConfig


def run_rank(config: BenchConfig, _: Any) -> None:
    """Each load; one that has no room is said to have none, and the next is tried."""
    files, plan = check_request(config)
    (name,), device = plan.processes, own_device()
    assert config.bench.cells is not None
    for load in plan.loads:
        request = request_of(config, files, load, device)
        if why := PEERS[name].why_not(request):
            add_line(config.bench.cells, Measured(name, 1, load.length, load.batch, why))
            continue
        who = PEERS[name].make(request)
        calls, cpu_s, peak = timed_calls(who, config, files, load, device)
        add_line(config.bench.cells, measured((name, 1), load, calls, cpu_s, [peak]))
        del who


COMMAND = RankCommand(
    "launch.bench.peer", BENCH.parse, check_request, run_rank, lambda: __doc__ or ""
)

if __name__ == "__main__":
    os.dup2(2, 1)  # some libraries print to standard output, which is the benchmark's
    run_program(COMMAND.main)
