"""What a model has to compute and to read whoever runs it: the floor of every measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ringstar.models.bind import BoundModel
from ringstar.models.facts import attention_heads
from ringstar.models.geometry import LayerShape, OneToken


@dataclass(frozen=True, slots=True)
class LayerWork:
    """Layers with one window (None: all is seen): operations of a visible pair of tokens, and
    bytes of a token's KV."""

    window: int | None
    pair_flops: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class ModelWork:
    """Floating point operations of the weights for one token, and bytes of the weights for it.

    `head_flops` are those of the logits, which a prompt needs once; `token_flops` all others.
    Of experts only those count that a token is sent to.
    """

    token_flops: int
    head_flops: int
    weight_bytes: int
    layers: list[LayerWork]

    def prompt_flops(self, tokens: int) -> int:
        """To read a prompt of so many tokens, and say what comes next."""
        attention = sum(each.pair_flops * _pairs(tokens, each.window) for each in self.layers)
        return self.token_flops * tokens + self.head_flops + attention

    def kv_bytes(self, past: int) -> int:
        """Of the KV that one more token behind so many sees; the weights are read beside."""
        return sum(each.kv_bytes * min(past, each.window or past) for each in self.layers)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> ModelWork:
        layers = [LayerWork(**each) for each in fields["layers"]]
        return ModelWork(**{**fields, "layers": layers})


@torch.inference_mode()
def work_of(bound: BoundModel) -> ModelWork:
    """Counted in a forward pass of one token, in which each weight that it needs is used once.

    Leaves experts in their plain form: the products of fused ones are not counted.
    """
    if hasattr(bound.model, "set_experts_implementation"):
        bound.model.set_experts_implementation("eager")
    one = torch.zeros(1, dtype=torch.int64, device=bound.device)
    like = torch.empty(0, dtype=bound.dtype, device=bound.device)
    context = OneToken(bound.rotary.plan(one, like, 1))
    with FlopCounterMode(display=False) as body:
        hidden_TC = bound.forward(one, one, context, logits=None)
    with FlopCounterMode(display=False) as head:
        bound.head(hidden_TC)
    token_flops, head_flops = body.get_total_flops(), head.get_total_flops()
    return ModelWork(
        token_flops,
        head_flops,
        (token_flops + head_flops) // 2 * bound.dtype.itemsize,
        [_layers(window, shapes, bound) for window, shapes in context.shapes.items()],
    )


def _layers(window: int | None, shapes: Sequence[LayerShape], bound: BoundModel) -> LayerWork:
    heads, _, _ = attention_heads(bound.config)
    pair_flops = sum(2 * heads * sum(shape.dims) for shape in shapes)
    kv_numbers = sum(shape.kv_heads * sum(shape.dims) for shape in shapes)
    return LayerWork(window, pair_flops, kv_numbers * bound.dtype.itemsize)


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, itself included."""
    seen = min(tokens, window or tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen
