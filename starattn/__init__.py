"""Star Attention: an approximate encode in blocks behind an anchor, exact over what is kept."""

from starattn.anchors import CONTENTS, POSITIONS, Anchor
from starattn.api import star_attention
from starattn.blocks import Blocks, make_blocks, token_size
from starattn.encode import AnchorKV, encode_layer
from starattn.plan import SHARES, Pass, plan_passes
from starattn.strategy import StarExtension, StarStrategy

__all__ = [
    "CONTENTS",
    "POSITIONS",
    "SHARES",
    "Anchor",
    "AnchorKV",
    "Blocks",
    "Pass",
    "StarExtension",
    "StarStrategy",
    "encode_layer",
    "make_blocks",
    "plan_passes",
    "star_attention",
    "token_size",
]
