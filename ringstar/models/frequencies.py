"""Rotary inverse frequencies in float64, from a config's rope parameters.

An inverse frequency is the angle, in radians, that a pair of columns turns by from one position to
the next.  Pair i of n starts from theta^(−i/n) (Su et al., "RoFormer", section 3.2.2); the other
rope types change that to reach longer texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """The rope parameters of one kind of layers.

    `max_positions` is the config's own limit; `truncate` says whether yarn's ramp begins and ends
    at whole pairs.
    """

    parameters: Mapping[str, Any]
    max_positions: int
    truncate: bool = True

    @classmethod
    def of(cls, config: Any, kind: str | None) -> Rope:
        """That of layers of this kind; None where all layers share one."""
        whole = config.rope_parameters
        # transformers looks for `truncate` beside the kinds, not in one of them
        truncate = whole.get("truncate", True)
        own = whole if kind is None else whole[kind]
        return cls(own, config.max_position_embeddings, truncate)

    @property
    def type(self) -> str:
        return self.parameters["rope_type"]

    @property
    def lengths(self) -> tuple[int, int]:
        """Two lengths of text whose frequencies differ, if those of any two do."""
        original = self.parameters.get("original_max_position_embeddings") or 0
        return 2, 2 * max(self.max_positions, original)

    def frequencies(self, pairs: int, length: int) -> Tensor:
        """(pairs,) float64, on the CPU, radians a position, for a text of `length` positions."""
        return _FREQUENCIES[self.type](self, pairs, length)

    def scale(self) -> float:
        """What cos and sin are multiplied by."""
        given = self.parameters.get("attention_factor")
        if self.type not in _SCALES:
            return 1.0
        return float(_SCALES[self.type](self) if given is None else given)

    def unscaled(self, pairs: int) -> Tensor:
        """(pairs,) float64, what the type of rope starts from."""
        return _geometric(self.parameters["rope_theta"], pairs)

    @property
    def factor(self) -> float:
        """How many times longer than the texts of its training this model's may be."""
        given = self.parameters.get("factor")
        return self.max_positions / self.original if given is None else given

    @property
    def original(self) -> int:
        """The longest text of the training before rope was scaled."""
        return self.parameters["original_max_position_embeddings"]


def _geometric(theta: float, pairs: int) -> Tensor:
    exponents = -torch.arange(pairs, dtype=torch.float64) / pairs
    return torch.pow(torch.tensor(float(theta), dtype=torch.float64), exponents)


def _default(rope: Rope, pairs: int, length: int) -> Tensor:
    return rope.unscaled(pairs)


def _linear(rope: Rope, pairs: int, length: int) -> Tensor:
    """Positions are squeezed into those of the training.

    Source: Chen et al., "Extending context window of large language models via positional
    interpolation", section 2.2.
    """
    return rope.unscaled(pairs) / rope.parameters["factor"]


def _dynamic(rope: Rope, pairs: int, length: int) -> Tensor:
    """Theta grows with the text, past the limit, so that the slowest pair is squeezed just enough.

    Source: Peng et al., "YaRN", sections 3.1 and 3.3; with `factor` the squeeze grows faster.
    """
    factor = rope.parameters["factor"]
    excess = max(length, rope.max_positions) / rope.max_positions - 1.0
    squeeze = 1.0 + factor * excess
    return _geometric(rope.parameters["rope_theta"] * squeeze ** (pairs / (pairs - 1)), pairs)


def _yarn(rope: Rope, pairs: int, length: int) -> Tensor:
    """Pairs that turn often stay as they are, slow ones are interpolated, with a ramp between.

    The ramp runs over the pairs' numbers: from the one that turns `beta_fast` times in the
    original length to the one that turns `beta_slow` times.

    Source: Peng et al., "YaRN", section 3.2.
    """
    theta = rope.parameters["rope_theta"]
    plain = rope.unscaled(pairs)

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(rope.original / (2 * math.pi * times), theta)

    first = pair_that_turns(rope.parameters.get("beta_fast") or 32)
    last = pair_that_turns(rope.parameters.get("beta_slow") or 1)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)  # columns, as the published code has it
    width = last - first or 0.001
    slow = ((torch.arange(pairs, dtype=torch.float64) - first) / width).clamp(0, 1)
    return plain * (slow / rope.factor + (1 - slow))


def _llama3(rope: Rope, pairs: int, length: int) -> Tensor:
    """As yarn, with a ramp over the number of turns in the original length.

    Source: Grattafiori et al., "The Llama 3 herd of models", and the config that came with 3.1.
    """
    plain = rope.unscaled(pairs)
    low, high = (rope.parameters[f"{end}_freq_factor"] for end in ("low", "high"))
    turns = plain * rope.original / (2 * math.pi)
    fast = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (fast + (1 - fast) / rope.parameters["factor"])


def _longrope(rope: Rope, pairs: int, length: int) -> Tensor:
    """A divisor for each pair that was searched for; others for texts that are short.

    Source: Ding et al., "LongRoPE", section 3.
    """
    which = "long_factor" if length > rope.original else "short_factor"
    divisors = torch.tensor(rope.parameters[which], dtype=torch.float64)
    return rope.unscaled(pairs) / divisors


def _yarn_scale(rope: Rope) -> float:
    """Source: Peng et al., "YaRN", section 3.4, the square root of 1/t; `mscale`: DeepSeek-V2."""

    def grown(by: float) -> float:
        return 1.0 + 0.1 * by * math.log(max(rope.factor, 1.0))

    one, all_columns = (rope.parameters.get(name) for name in ("mscale", "mscale_all_dim"))
    return grown(one) / grown(all_columns) if one and all_columns else grown(1.0)


def _longrope_scale(rope: Rope) -> float:
    """Source: Abdin et al., "Phi-3 technical report": by the logarithms of both lengths."""
    return math.sqrt(1 + math.log(max(rope.factor, 1.0)) / math.log(rope.original))


_FREQUENCIES = {
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
_SCALES = {"longrope": _longrope_scale, "yarn": _yarn_scale}
