"""What both strategies share: transports, layouts, ring schedules, the cross-rank merge."""

from seqpar.layout import (
    Layout,
    LayoutKind,
    Run,
    Runs,
    before,
    clip,
    joined,
    positions,
    token_count,
)
from seqpar.local import Attend, accumulate_tiles, rows_of
from seqpar.packing import Part, Span, cut, packed_steps, side_by_side
from seqpar.room import kv_over, kv_room, token_nbytes
from seqpar.schedule import Step, Tile, Work, pairs, ring_steps, tiles, travels, visible
from seqpar.softmax import Held, attend_sharded, merge_across_ranks, query_attention
from seqpar.threads import Link, ThreadTransport, ThreadWorld
from seqpar.transport import Counters, Done, Event, Handle, Transport, TransportError

__all__ = [
    "Attend",
    "Counters",
    "Done",
    "Event",
    "Handle",
    "Held",
    "Layout",
    "LayoutKind",
    "Link",
    "Part",
    "Run",
    "Runs",
    "Span",
    "Step",
    "ThreadTransport",
    "ThreadWorld",
    "Tile",
    "Transport",
    "TransportError",
    "Work",
    "accumulate_tiles",
    "attend_sharded",
    "before",
    "clip",
    "cut",
    "joined",
    "kv_over",
    "kv_room",
    "merge_across_ranks",
    "packed_steps",
    "pairs",
    "positions",
    "query_attention",
    "ring_steps",
    "rows_of",
    "side_by_side",
    "tiles",
    "token_count",
    "token_nbytes",
    "travels",
    "visible",
]
