"""The KV that a model's layers make: how many heads, how large, and what a window shows of it.

Seen in a forward pass of one token, so that no config has to be read for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringstar.models.attention import PositionEmbeddings


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The KV heads of one layer; `dims` are the sizes of a key and of a value."""

    layer: int
    kv_heads: int
    dims: tuple[int, int]


# the layers of each window, None for those that see everything
Shapes = dict[int | None, list[LayerShape]]


class OneToken:
    """A forward pass of one token, which sees itself alone: its attention is its own value."""

    def __init__(self, position_embeddings: PositionEmbeddings):
        self.position_embeddings = position_embeddings
        self.shapes: Shapes = {}

    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        *,
        window: int | None,
        **_: Any,
    ) -> Tensor:
        """The values, repeated for the heads that share them (B, 1, H, D)."""
        shape = LayerShape(layer, k_BTKD.shape[2], (k_BTKD.shape[3], v_BTKD.shape[3]))
        self.shapes.setdefault(window, []).append(shape)
        return v_BTKD.repeat_interleave(q_BTHD.shape[2] // v_BTKD.shape[2], dim=2)


@torch.inference_mode()
def run_once(bound: Any) -> Shapes:
    """One token through a `BoundModel`, before ranks share it; what its layers make of it.

    Some quantised layers repack their weights when they are first called, which simulated ranks
    must not do at once; and some run only in the dtype in which they were stored, which shows here
    rather than in the middle of an encode.
    """
    one = torch.zeros(1, dtype=torch.int64, device=bound.device)
    like = torch.empty(0, dtype=bound.dtype, device=bound.device)
    context = OneToken(bound.rotary.plan(one, like, 1))
    bound.whole(
        input_ids=one.unsqueeze(0),
        position_ids=one.unsqueeze(0),
        use_cache=False,
        logits_to_keep=1,
        ringstar_context=context,
    )
    return context.shapes
