"""cos and sin by position and by the length of the whole text, in float32 or float64."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ringstar.errors import UserError
from ringstar.models.attention import PositionEmbeddings
from ringstar.models.families import BY_LENGTH, rope_types
from ringstar.models.frequencies import Rope

# of the frequency before it was scaled: modules compute the scaling too in float32, and where it
# nearly cancels that rounds to more than 1e-6 of what is left (llama3 with factor 32: 2.2e-6)
AGREES = 1e-6


class Rotary:
    """The model's own formulas, outside of its forward; or the same in float64.

    Called in the forward, the module would see what one rank sees: kinds whose frequencies
    depend on the length (`dynamic`, `longrope`) take it from the largest position they are
    given, and rewrite themselves.  Here they are given the length of the whole text, and each
    time a copy as it was loaded: nothing carries over to another document or rank.

    With `precision="float64"` frequencies, angles, cos and sin are float64; the module only says
    in which columns they stand and which dtype the layers take.  One whose own frequencies are
    not ours is refused by a UserError.
    """

    def __init__(self, module: nn.Module, config: Any, precision: str = "float32"):
        self.by_length = not BY_LENGTH.isdisjoint(rope_types(config))
        self._module = _as_made(module) if self.by_length else module
        by_kind = "layer_type" in inspect.signature(module.forward).parameters
        self.kinds = tuple(sorted(set(config.layer_types))) if by_kind else (None,)
        self.precision = precision
        self._columns = {}
        if precision == "float64":
            self._columns = {kind: self._matching(kind, config) for kind in self.kinds}

    def plan(self, positions_T: Tensor, like: Tensor, length: int) -> PositionEmbeddings:
        """cos, sin (1, T, D) in the dtype and on the device of `like`, for int64 positions.

        `length` counts the positions of the whole text, at least those up to the last one here.
        """
        if self._columns:
            return {kind: c.plan(positions_T, like, length) for kind, c in self._columns.items()}
        return {kind: self._own(kind, positions_T, like, length) for kind in self.kinds}

    def plan_texts(self, texts: Sequence[tuple[Tensor, int]], like: Tensor) -> PositionEmbeddings:
        """The same for texts side by side, each (positions_T, length): cos, sin (1, ΣT, D)."""
        if not self.by_length:
            positions_T = torch.cat([positions_T for positions_T, _ in texts])
            return self.plan(positions_T, like, max(length for _, length in texts))
        plans = [self.plan(positions_T, like, length) for positions_T, length in texts]
        both = {kind: [plan[kind] for plan in plans] for kind in self.kinds}
        return {
            kind: (torch.cat([cos for cos, _ in pairs], 1), torch.cat([sin for _, sin in pairs], 1))
            for kind, pairs in both.items()
        }

    def same(self, length: int, other: int) -> bool:
        """Whether texts of these two lengths have the same frequencies."""
        if length == other or not self.by_length:
            return True
        plans = [self.plan(self._one, self._like64, max(2, n)) for n in (length, other)]
        return all(
            torch.equal(mine, theirs)
            for kind in self.kinds
            for mine, theirs in zip(plans[0][kind], plans[1][kind], strict=True)
        )

    def _own(
        self, kind: str | None, positions_T: Tensor, like: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """cos, sin (1, T, D) of the module itself."""
        last = positions_T.new_tensor([length - 1])
        positions_1T = torch.cat([positions_T, last]).unsqueeze(0)
        module: Any = copy.deepcopy(self._module)
        of_kind = {} if kind is None else {"layer_type": kind}
        cos, sin = module(like.new_empty(0), positions_1T, **of_kind)
        return cos[:, :-1], sin[:, :-1]

    def _matching(self, kind: str | None, config: Any) -> _Columns:
        """Our columns, once they are shown to be the module's, for short texts and long ones."""
        rope = Rope.of(config, kind)
        lengths = rope.lengths
        owns = [self._own(kind, self._one, self._like64, length) for length in lengths]
        like16 = torch.empty(0, dtype=torch.bfloat16, device=self._one.device)
        follows = self._own(kind, self._one, like16, lengths[0])[0].dtype == like16.dtype
        width, off = owns[0][0].shape[-1], float("inf")
        for arrange, copies in ((_halves, 2), (_neighbours, 2), (_once, 1)):
            columns = _Columns(rope, width // copies, arrange, follows)
            if width % copies:
                continue
            differs = max(
                columns.differs(cos, sin, length)
                for (cos, sin), length in zip(owns, lengths, strict=True)
            )
            if differs <= AGREES:
                return columns
            off = min(off, differs)
        of_kind = "" if kind is None else f" in layers of kind {kind}"
        raise UserError(
            "rope.precision",
            self.precision,
            f"this model's own frequencies (rope {rope.type}{of_kind}) are not those of the formula"
            f" in float64: they differ by {off:.1e}; allowed: float32, as the model has them",
        )

    @property
    def _one(self) -> Tensor:
        """Position 1, whose angles are the frequencies themselves."""
        return torch.ones(1, dtype=torch.int64, device=next(self._module.buffers()).device)

    @property
    def _like64(self) -> Tensor:
        return torch.empty(0, dtype=torch.float64, device=self._one.device)


@dataclass(frozen=True)
class _Columns:
    """cos and sin of one kind of layers in float64, in the columns where its module has them.

    `follows` says whether the module gives the model's dtype, or float32 whatever that is.
    """

    rope: Rope
    pairs: int
    arrange: Callable[[Tensor], Tensor]
    follows: bool

    def plan(self, positions_T: Tensor, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin (1, T, D)."""
        frequencies = self.rope.frequencies(self.pairs, length).to(positions_T.device)
        angles_TP = positions_T.double().unsqueeze(-1) * frequencies
        dtype = like.dtype if self.follows else torch.promote_types(like.dtype, torch.float32)
        scale = self.rope.scale()
        both = (angles_TP.cos() * scale).to(dtype), (angles_TP.sin() * scale).to(dtype)
        cos, sin = (self.arrange(each).unsqueeze(0) for each in both)
        return cos, sin

    def differs(self, cos_11D: Tensor, sin_11D: Tensor, length: int) -> float:
        """How far the module's cos and sin of position 1 are from ours, in frequency and scale.

        Frequencies (at most 1) are compared as angles, relative to what they were before scaling.
        """
        own, scale = torch.atan2(sin_11D, cos_11D).flatten(), self.rope.scale()
        ours = self.arrange(self.rope.frequencies(self.pairs, length)).to(own.device)
        plain = self.arrange(self.rope.unscaled(self.pairs)).to(own.device)
        if ours.shape != own.shape:
            return float("inf")
        frequency = ((ours - own).abs() / plain).max()
        length_of_arrow = torch.hypot(cos_11D, sin_11D).flatten()
        return float(torch.maximum(frequency, (length_of_arrow / scale - 1).abs().max()))


def _as_made(module: nn.Module) -> nn.Module:
    """A module of its kind that no text has changed yet."""
    made: Any = type(module)
    return made(module.config).to(next(module.buffers()).device)


def _halves(angles: Tensor) -> Tensor:
    """Pair i in columns i and i + n."""
    return torch.cat([angles, angles], dim=-1)


def _neighbours(angles: Tensor) -> Tensor:
    """Pair i in columns 2i and 2i + 1."""
    return angles.repeat_interleave(2, dim=-1)


def _once(angles: Tensor) -> Tensor:
    """Pair i in column i; the layers know where the other is."""
    return angles
