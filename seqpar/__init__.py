"""What both strategies share: transports, layouts, ring schedules, the cross-rank merge."""

from seqpar.layout import Layout, LayoutKind, Run, Runs, clip, positions, token_count
from seqpar.local import Attend, accumulate_tiles
from seqpar.schedule import Step, Tile, Work, pairs, ring_steps, tiles, travels, visible
from seqpar.softmax import attend_sharded, merge_across_ranks, query_attention
from seqpar.threads import Link, ThreadTransport, ThreadWorld
from seqpar.transport import Counters, Done, Event, Handle, Transport, TransportError

__all__ = [
    "Attend",
    "Counters",
    "Done",
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
    "Work",
    "accumulate_tiles",
    "attend_sharded",
    "clip",
    "merge_across_ranks",
    "pairs",
    "positions",
    "query_attention",
    "ring_steps",
    "tiles",
    "token_count",
    "travels",
    "visible",
]
