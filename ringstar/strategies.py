"""The contract of a strategy, and the factory that makes one by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from localflash import DenseKV
from ringattn import RingStrategy
from ringstar.config import EncodeConfig, RingConfig, StrategyConfig
from seqpar import Attend, Runs, Transport


class Extension(Protocol):
    """Some new tokens of a document, encoded in one forward pass."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...

    @property
    def own(self) -> Runs:
        """The positions that this rank computes and keeps."""
        ...

    @property
    def owned(self) -> tuple[Runs, ...]:
        """The positions that each rank keeps."""
        ...

    def attend(
        self,
        q_BTHD: Tensor,
        new: DenseKV,
        past: DenseKV,
        *,
        window: int | None,
        attend: Attend,
    ) -> Tensor:
        """One layer's attention for this rank's new tokens; float32 (B, T, H, D)."""
        ...


class Strategy(Protocol):
    """How positions [start, stop) are encoded after what each rank already holds."""

    def extensions(self, start: int, stop: int, past: tuple[Runs, ...]) -> Iterator[Extension]: ...


def make_strategy(config: StrategyConfig, encode: EncodeConfig, transport: Transport) -> Strategy:
    """One line per strategy."""
    if isinstance(config, RingConfig):
        return RingStrategy(
            transport,
            layout=config.layout,  # type: ignore[arg-type]  # checked by config.check
            chunk_tokens=encode.chunk_tokens,
            past_by=config.past_by,  # type: ignore[arg-type]
        )
    # dense is a ring of one: nothing travels
    return RingStrategy(transport, layout="contiguous", chunk_tokens=encode.chunk_tokens)
