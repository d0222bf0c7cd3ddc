"""Attention alone on one number of ranks, at every length.

`python -m launch.bench` starts it for each number of ranks; what is measured goes to bench.cells.
"""

from __future__ import annotations

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

from typing import Any

from launch.bench.attention import PEER, PREPARED, contenders, seconds_of, why_not
from launch.bench.cells import AttentionTimes, add_line
from launch.bench.ranks import check_request
from launch.options import BENCH
from launch.start import RankCommand, run_program
from ringstar.attention_alone import random_qkv
from ringstar.config import BenchConfig
from ringstar.metrics import largest
from ringstar.models import ModelFiles, choose_dtype
from ringstar.ranks import Ranks, Transport, make_ranks


def run_rank(config: BenchConfig, phases: Any) -> None:
    """What every rank does: connect, and measure; rank 0 writes."""
    files, plan = check_request(config)
    ranks, _ = make_ranks(config.transport, phases)
    first = ranks.transports[0]
    for name in contenders(first.world_size):
        for length in plan.lengths:
            line = attention_times(config, files, ranks, name, length)
            if first.rank == 0 and config.bench.cells is not None:
                add_line(config.bench.cells, line)
    for transport in ranks.transports:
        transport.close()


def attention_times(
    config: BenchConfig, files: ModelFiles, ranks: Ranks, name: str, length: int
) -> AttentionTimes:
    """Of the slowest rank, call by call."""
    given, first = config.bench, ranks.transports[0]
    if name == PEER and (why := why_not(length, first.world_size)):
        return AttentionTimes(name, first.world_size, length, why_not=why)
    dtype, _ = choose_dtype(config.model, files.config, first.device)

    def on_rank(transport: Transport) -> list[float]:
        qkv = random_qkv(files.config, length, dtype, transport.device)
        call = PREPARED[name](qkv, transport)
        found = seconds_of(call, transport.barrier, given.warm_ups, given.requests)
        return largest(transport, found)

    return AttentionTimes(name, first.world_size, length, ranks.run(on_rank)[0])


COMMAND = RankCommand(
    "launch.bench.attention_ranks", BENCH.parse, check_request, run_rank, lambda: __doc__ or ""
)

if __name__ == "__main__":
    run_program(COMMAND.main)
