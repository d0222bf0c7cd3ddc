"""One peer in a process of its own, with all cores or one GPU.

`python -m launch.bench` starts it for each; what is measured goes to bench.cells.
"""

from __future__ import annotations

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

import os
from typing import Any

from launch.bench.cells import Load, Measured, add_line, measured
from launch.bench.measure import timed_calls
from launch.bench.peers import PEERS, Peer, Request
from launch.bench.plan import own_device, request_of
from launch.bench.ranks import check_request
from launch.options import BENCH
from launch.start import RankCommand, run_program
from ringstar.config import BenchConfig
from ringstar.errors import in_a_line


def run_rank(config: BenchConfig, _: Any) -> None:
    """Each load; one that has no room is said to have none, and the next is tried."""
    files, plan = check_request(config)
    (name,), device = plan.processes, own_device()
    assert config.bench.cells is not None
    for load in plan.loads:
        request = request_of(config, files, load, device)
        try:
            line = _cell(config, PEERS[name], name, load, request)
        except Exception as error:  # theirs, whatever it is: the next load may do
            line = Measured(name, 1, load.length, load.batch, in_a_line(error))
        add_line(config.bench.cells, line)


def _cell(config: BenchConfig, peer: Peer, name: str, load: Load, request: Request) -> Measured:
    if why := peer.why_not(request) or peer.no_room(request):
        return Measured(name, 1, load.length, load.batch, why)
    with peer.make(request) as who:
        calls, cpu_s, peak = timed_calls(who, config, request.files, load, request.device)
    # what others have on a GPU, PyTorch does not see
    seen = request.device.type == "cpu" or not peer.own_formats
    return measured((name, 1), load, calls, cpu_s, [peak] if seen else [])


COMMAND = RankCommand(
    "launch.bench.peer", BENCH.parse, check_request, run_rank, lambda: __doc__ or ""
)

if __name__ == "__main__":
    os.dup2(2, 1)  # some libraries print to standard output, which is the benchmark's
    run_program(COMMAND.main)
