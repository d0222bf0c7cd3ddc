"""KV that lies in several pieces, read as one.

B sequences, T tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from .views import KV, Segment


@dataclass(frozen=True, slots=True)
class JoinedKV:
    """The tokens of `parts` one after another; at least one part, which may be empty.

    The parts are of one form and of the same sequences. Only `tensors` copies, and only from
    several parts. ValueError without a part: nothing would say of which form it is.
    """

    parts: tuple[KV, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts is empty: must have a part, such as kv.slice(0, 0)")

    @property
    def batch(self) -> int:
        return self.parts[0].batch

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the only part, or a copy of all; ValueError if parts differ in form."""
        if len(self.parts) == 1:
            return self.parts[0].tensors
        return tuple(_gathered(pieces) for pieces in self.pieces)

    @property
    def pieces(self) -> tuple[tuple[Tensor, ...], ...]:
        """ValueError if parts differ in form."""
        each = [part.pieces for part in self.parts]
        if len({len(pieces) for pieces in each}) > 1:
            raise ValueError("parts are of several forms: only parts of one form go together")
        return tuple(tuple(chain.from_iterable(same)) for same in zip(*each, strict=True))

    def slice(self, start: int, stop: int) -> KV:
        clipped, at = [], 0
        for part in self.parts:
            first, last = max(start - at, 0), min(stop - at, part.tokens)
            if first < last:
                clipped.append(part.slice(first, last))
            at += part.tokens
        return joined_kv(clipped or [self.parts[0].slice(0, 0)])

    def of(self, tensors: tuple[Tensor, ...]) -> KV:
        return self.parts[0].of(tensors)

    def segments(self, dtype: torch.dtype) -> Iterator[Segment]:
        at = 0
        for part in self.parts:
            for batch, start, k_BTHD, v_BTHD in part.segments(dtype):
                yield Segment(batch, at + start, k_BTHD, v_BTHD)
            at += part.tokens


def joined_kv(parts: Sequence[KV]) -> KV:
    """`parts` one after another: the only one itself, or a `JoinedKV`."""
    return parts[0] if len(parts) == 1 else JoinedKV(tuple(parts))


def _gathered(pieces: tuple[Tensor, ...]) -> Tensor:
    if len({piece.dtype for piece in pieces}) > 1:  # torch.cat would convert them
        dtypes = ", ".join(str(piece.dtype) for piece in pieces)
        raise ValueError(f"parts are of several dtypes ({dtypes}): they cannot be sent together")
    return torch.cat(pieces, dim=1)
