"""Star Attention as the runtime uses it: the forward passes of a document's phase 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from localflash import KV, Partial
from seqpar import Attend, Part, Run, Runs, Span, Transport, Work, token_count
from starattn.anchors import Anchor
from starattn.blocks import Blocks, make_blocks
from starattn.encode import AnchorKV, encode_layer
from starattn.plan import Pass, Share, plan_passes


@dataclass(frozen=True)
class StarExtension:
    """One forward pass of this rank: anchor tokens, if it computes any, then its own.

    `number`: which of the documents that are encoded together it is for.
    """

    number: int
    step: Pass
    blocks: Blocks
    anchor: Anchor
    anchors: AnchorKV
    transport: Transport
    vocab_size: int

    @property
    def parts(self) -> tuple[Part, ...]:
        """Blocks are encoded in any order: nothing is known to be over."""
        return (Part(self.number, self.positions, self.kept, encoded=0),)

    @property
    def positions(self) -> Runs:
        """What this rank computes, in order."""
        dropped = self.step.dropped
        if not dropped:
            return self.kept
        first = self.anchor.run(self.step.lane.block, self.blocks).start
        return (Run(first + dropped.start, first + dropped.stop), *self.kept)

    @property
    def kept(self) -> Runs:
        """The positions among them that it keeps, which come last."""
        return self.step.kept

    @property
    def work(self) -> Work:
        return Work(token_count(self.positions), self.step.pairs)

    def token_ids(self, ids: Sequence[Sequence[int]]) -> list[int]:
        """The tokens at `positions`, which for an anchor may be others than the document's."""
        document = ids[self.number]
        dropped, block = self.step.dropped, self.step.lane.block
        anchor: list[int] = []
        if dropped:
            anchor = self.anchor.token_ids(block, self.blocks, document, self.vocab_size)
        own = [document[position] for run in self.kept for position in run]
        return anchor[dropped.start : dropped.stop] + own

    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        new: KV,
        pasts: Sequence[KV],
        *,
        window: int | None,
        attend: Attend,
    ) -> Partial:
        """One layer's attention for the tokens of this pass; float32, complete over all keys."""
        if window is not None and window < self.blocks.tokens:
            raise ValueError("Star Attention is not defined for a window shorter than the document")
        (past,) = pasts
        return encode_layer(
            layer, q_BTHD, new, past, self.step, self.anchors, self.transport, attend
        )


class StarStrategy:
    """Blocks of a document, each encoded behind an anchor.

    block_size, anchor_size: tokens; see `make_blocks`.  share: how often the anchor's KV is
    computed.  chunk_tokens bounds a forward pass.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        block_size: int | str | None = None,
        anchor_size: int | str | None = None,
        share: Share = "world",
        anchor: Anchor | None = None,
        chunk_tokens: int = 8192,
        vocab_size: int = 0,
    ):
        self._sizes = (block_size, anchor_size)
        self._share, self._anchor = share, anchor or Anchor()
        self._transport, self._chunk_tokens = transport, chunk_tokens
        self._vocab_size = vocab_size

    def plan(self, spans: Sequence[Span]) -> tuple[list[tuple[Runs, ...]], list[StarExtension]]:
        """What each rank keeps of each document, and this rank's forward passes, one by one."""
        planned = [self._document(number, span) for number, span in enumerate(spans)]
        return [owned for owned, _ in planned], [step for _, steps in planned for step in steps]

    def _document(self, number: int, span: Span) -> tuple[tuple[Runs, ...], list[StarExtension]]:
        if span.start or any(span.past):
            raise ValueError("Star Attention encodes whole documents, not what follows one")
        world, rank = self._transport.world_size, self._transport.rank
        blocks = make_blocks(span.stop, world, *self._sizes)
        steps = plan_passes(blocks, rank, self._share, self._anchor.is_head, self._chunk_tokens)
        anchors = AnchorKV(blocks.anchor)
        shared = (blocks, self._anchor, anchors, self._transport, self._vocab_size)
        owned = tuple(blocks.owned(other) for other in range(world))
        return owned, [StarExtension(number, step, *shared) for step in steps]
