"""cos and sin from a model's own rotary module, by position and by the length of the whole text."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ringstar.models.attention import PositionEmbeddings


class Rotary:
    """The model's own formulas, outside of its forward.

    Called in the forward, the module would see what one rank sees: kinds whose frequencies
    depend on the length (`dynamic`, `longrope`) take it from the largest position they are
    given, and rewrite themselves.  Here they are given the length of the whole text, and each
    time a copy as it was loaded: nothing carries over to another document or rank.
    """

    def __init__(self, module: nn.Module, config: Any):
        self._module = module
        by_kind = "layer_type" in inspect.signature(module.forward).parameters
        self.kinds = tuple(sorted(set(config.layer_types))) if by_kind else (None,)

    def plan(self, positions_T: Tensor, like: Tensor, length: int) -> PositionEmbeddings:
        """cos, sin (1, T, D) in the dtype and on the device of `like`, for int64 positions.

        `length` counts the positions of the whole text, at least those up to the last one here.
        """
        last = positions_T.new_tensor([length - 1])
        positions_1T = torch.cat([positions_T, last]).unsqueeze(0)
        planned = {}
        for kind in self.kinds:
            module: Any = copy.deepcopy(self._module)
            of_kind = {} if kind is None else {"layer_type": kind}
            cos, sin = module(like.new_empty(0), positions_1T, **of_kind)
            planned[kind] = cos[:, :-1], sin[:, :-1]
        return planned

    def same(self, length: int, other: int) -> bool:
        """Whether texts of these two lengths have the same frequencies."""
        if length == other:
            return True
        like = torch.empty(0, dtype=torch.float64, device=next(self._module.buffers()).device)
        one = torch.ones(1, dtype=torch.int64, device=like.device)
        plans = [self.plan(one, like, max(2, n)) for n in (length, other)]
        return all(
            torch.equal(mine, theirs)
            for kind in self.kinds
            for mine, theirs in zip(plans[0][kind], plans[1][kind], strict=True)
        )
