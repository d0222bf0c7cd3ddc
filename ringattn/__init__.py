"""Ring Attention: exact attention over a sequence sharded over a ring of ranks."""

from ringattn.api import ring_attention
from ringattn.plan import Costs, ExtendPlan, PackedPlan
from ringattn.prefill import KVBuffers, Past, Ring, extend, ring_pass
from ringattn.strategy import RingExtension, RingStrategy

__all__ = [
    "Costs",
    "ExtendPlan",
    "KVBuffers",
    "PackedPlan",
    "Past",
    "Ring",
    "RingExtension",
    "RingStrategy",
    "extend",
    "ring_attention",
    "ring_pass",
]
