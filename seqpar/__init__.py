"""What both strategies share: transports, layouts, ring schedules, the cross-rank merge."""

from seqpar.layout import Layout, LayoutKind, Run, Runs, positions, token_count
from seqpar.local import Attend, accumulate_tiles
from seqpar.schedule import Step, Tile, ring_steps, tiles, travels, visible
from seqpar.softmax import attend_sharded, merge_across_ranks
from seqpar.threads import Link, ThreadTransport, ThreadWorld
from seqpar.transport import Counters, Event, Handle, Transport, TransportError

__all__ = [
    "Attend",
    "Counters",
    "Event",
    "Handle",
    "Layout",
    "LayoutKind",
    "Link",
    "Run",
    "Runs",
    "Step",
    "ThreadTransport",
    "ThreadWorld",
    "Tile",
    "Transport",
    "TransportError",
    "accumulate_tiles",
    "attend_sharded",
    "merge_across_ranks",
    "positions",
    "ring_steps",
    "tiles",
    "token_count",
    "travels",
    "visible",
]
