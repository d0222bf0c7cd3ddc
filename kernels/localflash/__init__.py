"""Local attention on one device, with partial results that merge.

`attend` and `attend_cached` give (out, lse) over the keys that a `Band` shows; `merge` and its
kin combine such partials exactly. Read in this order: band.py (who sees whom), merge.py,
reference.py (the specification), tiles.py (any band from full and square causal calls),
backends.py (the table), api.py.

Shapes: q (B, Tq, H, D), k and v (B, Tk, Hkv, D), out (B, Tq, H, D) float32, lse (B, H, Tq)
float32, natural log, -inf for a row that sees no key.
"""

from .api import UNIFIED_IN_FLOAT16, attend, attend_cached
from .backends import BACKENDS, Backend, Case, Choice, available, choose
from .band import Band, Piece, from_key, normalise, pieces, split_steps
from .joined import JoinedKV, joined_kv
from .merge import Partial, add_sinks, empty_partial, merge, merge_into, merge_many
from .quantised import QuantKV, quantise
from .reference import attend_cached_reference, attend_reference
from .views import KV, DenseKV, KVView, PagedKV, Segment

__all__ = [
    "BACKENDS",
    "KV",
    "UNIFIED_IN_FLOAT16",
    "Backend",
    "Band",
    "Case",
    "Choice",
    "DenseKV",
    "JoinedKV",
    "KVView",
    "PagedKV",
    "Partial",
    "Piece",
    "QuantKV",
    "Segment",
    "add_sinks",
    "attend",
    "attend_cached",
    "attend_cached_reference",
    "attend_reference",
    "available",
    "choose",
    "empty_partial",
    "from_key",
    "joined_kv",
    "merge",
    "merge_into",
    "merge_many",
    "normalise",
    "pieces",
    "quantise",
    "split_steps",
]
