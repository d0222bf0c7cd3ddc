"""python -m pytest tests/ringstar/test_star_faults.py

Faults that published code or the paper has had, or that are easy to make, put into Star
Attention one at a time: each must exceed the bound of `test_star_exact.py` a hundredfold.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import seqpar.softmax
import starattn.encode
import starattn.plan
from localflash import Band
from ringstar import LongContext
from ringstar.config import Config, EncodeConfig, ModelConfig, StarConfig, TransportConfig
from ringstar.engine import RankEngine
from ringstar.passes import ReplicatedPart
from seqpar import Run, Tile, tiles, token_count
from starattn import Anchor, AnchorKV, Blocks, StarExtension, StarStrategy
from starattn.plan import Lane, Stretch
from tests.support.models import random_ids, relative_error, tiny_folder
from tests.support.runtime import ANEW
from tests.support.star_oracle import anchored, first_anchor, star

BOUND, GREEDY = 1e-5, 6
DOCUMENT, BLOCK, ANCHOR, WORLD = 58, 15, 7, 4  # a block for each rank; the last has 13 tokens


@dataclass(frozen=True)
class Scenario:
    share: str = "none"
    query: int = 6
    world: int = WORLD
    block: int = BLOCK
    chunk_tokens: int = 8192


def outcome(scenario: Scenario) -> tuple[float, bool]:
    """(error of the first logits, whether the greedy tokens are right)"""
    folder = tiny_folder("llama")
    ids, question = random_ids(DOCUMENT, seed=1), random_ids(scenario.query, seed=2)
    blocks = anchored(DOCUMENT, scenario.block, first_anchor(ids, ANCHOR))
    want = star(folder, ids, question, blocks, GREEDY)
    runtime = LongContext.from_config(
        Config(
            model=ModelConfig(path=folder),
            strategy=StarConfig(
                block_size=scenario.block, anchor_size=ANCHOR, share_anchor=scenario.share
            ),
            transport=TransportConfig("threads", scenario.world, threads_per_rank=1),
            encode=EncodeConfig(scenario.chunk_tokens),
            cache=ANEW,
        )
    )
    answer = runtime.ask(runtime.encode(ids), question, max_new_tokens=GREEDY)
    return relative_error(answer.first_logits, want.first_V), answer.ids == want.ids


# -- phase 2 -----------------------------------------------------------------------------


def causal_on_every_rank(patch):
    """As published: bottom-right aligned, which hides the last Q − 1 − i keys from row i."""

    def causal(self, window, held):
        tokens = self.rows.stop - self.rows.start
        new = (Run(self.start, self.start + tokens),)
        context = tuple(run for run in held if run.start < self.start)
        context = tuple(Run(r.start, min(r.stop, self.start), r.step) for r in context)
        keys, rows = token_count(context), slice(0, tokens)
        hidden = Tile(rows, slice(0, keys), Band(keys - tokens, 1, 0, 1))
        own = [
            Tile(tile.q, slice(tile.k.start + keys, tile.k.stop + keys), tile.band)
            for tile in tiles(new, self.own, window)
        ]
        return ((hidden,) if keys else ()) + tuple(own)

    right = ReplicatedPart.tiles
    patch(
        ReplicatedPart,
        "tiles",
        lambda self, *args: (causal if self.start == DOCUMENT else right)(self, *args),
    )


def partials_weighted_by_each_other(patch):
    """The merge as the paper's algorithm 2 prints it: each side bears the other's weight."""

    def swapped(outs, lses):
        out, lse = outs[0].clone(), lses[0].clone()
        for out_b, lse_b in zip(outs[1:], lses[1:], strict=True):
            total = torch.logaddexp(lse, lse_b)
            weights = torch.exp(lse_b - total), torch.exp(lse - total)
            mine, other = (torch.nan_to_num(w).transpose(1, 2).unsqueeze(-1) for w in weights)
            out, lse = out * mine + out_b * other, total
        return out, lse

    patch(seqpar.softmax, "merge_many", swapped)


def anchor_kept_in_the_cache(patch):
    """Every rank's copy of the anchor is there for the question to see."""
    right = StarStrategy.plan

    def plan(self, spans):
        (owned,), extensions = right(self, spans)
        head = (Run(0, ANCHOR),)
        return [tuple(head * (rank > 0) + own for rank, own in enumerate(owned))], extensions

    def kept(self):
        dropped = self.step.dropped
        return (*((dropped,) if dropped else ()), *self.step.kept)

    patch(StarStrategy, "plan", plan)
    patch(StarExtension, "kept", property(kept))


def question_after_the_padded_length(patch):
    """The question is placed behind whole blocks, not behind the document."""
    right = RankEngine._rotary

    def later(self, plans):
        ((positions_T, length),) = plans
        asked = int(positions_T.min()) >= DOCUMENT
        return right(self, [(positions_T + asked * (-DOCUMENT % BLOCK), length + BLOCK)])

    patch(RankEngine, "_rotary", later)


# -- phase 1 -----------------------------------------------------------------------------


def anchor_one_position_later(patch):
    right = Anchor.run

    def run(self, block, blocks):
        first = right(self, block, blocks)
        return Run(first.start + 1, first.stop + 1)

    patch(Anchor, "run", run)


def anchor_directly_before_its_block(patch):
    def run(self, block, blocks):
        stop = blocks.run(block).start
        return Run(stop - blocks.anchor, stop)

    patch(Anchor, "run", run)


def blocks_restart_at_zero(patch):
    def positions(self):
        dropped, kept = self.step.dropped, token_count(self.kept)
        return (*((dropped,) if dropped else ()), Run(0, kept))

    patch(StarExtension, "positions", property(positions))


def blocks_right_behind_their_anchor(patch):
    """Positions 0, 1, … of `[anchor ; block]`, as a model counts that is given none."""

    def positions(self):
        return (Run(0, len(self.step.dropped) + token_count(self.kept)),)

    patch(StarExtension, "positions", property(positions))


def remainder_padded(patch):
    """The last block is filled up to the others' length."""
    patch(Blocks, "run", lambda self, block: Run(block * self.size, (block + 1) * self.size))
    right = StarExtension.token_ids
    padding = [0] * BLOCK
    patch(StarExtension, "token_ids", lambda self, ids: right(self, [[*ids[0], *padding]]))


def remainder_dropped(patch):
    """The last tokens are cut off to a whole number of blocks, and the rest encoded."""
    patch(Blocks, "count", property(lambda self: self.tokens // self.size))


def anchor_not_seen(patch):
    right = starattn.plan._stretches

    def alone(blocks: Blocks, own: range, dropped: int) -> list[Stretch]:
        found = right(blocks, own, 0)
        return [Stretch(s.start + dropped, s.stop + dropped) for s in found]

    patch(starattn.plan, "_stretches", alone)


def first_block_behind_an_anchor_too(patch):
    """It then sees its own beginning twice."""
    lane, stretches = starattn.plan._lane, starattn.plan._stretches

    def behind(blocks: Blocks, own: range, dropped: int, **options) -> Lane:
        return lane(blocks, own, blocks.anchor, **options)

    def causal(blocks: Blocks, own: range, dropped: int) -> list[Stretch]:
        tokens = dropped + len(blocks.run(0))
        return stretches(blocks, own, dropped) if own[0] else [Stretch(0, tokens)]

    patch(starattn.plan, "_lane", behind)
    patch(starattn.plan, "_stretches", causal)


def blocks_of_a_rank_see_each_other(patch):
    """Causal over all that the rank computes, as if its blocks were one."""

    def one(blocks: Blocks, own: range, dropped: int) -> list[Stretch]:
        tokens = sum(len(blocks.run(block)) for block in own)
        prefix = Run(0, blocks.anchor) if own[0] else None
        anchor = [Stretch(0, dropped)] if dropped else []
        return [*anchor, Stretch(dropped, dropped + tokens, prefix)]

    patch(starattn.plan, "_stretches", one)


def broadcast_not_awaited(patch):
    """The anchor is read before it has come: what lies there is not its KV."""
    right = AnchorKV.packed

    def packed(self, layer, like, step):
        held = right(self, layer, like, step)
        return held if len(step.made) else torch.zeros_like(held)

    patch(AnchorKV, "packed", packed)


def anchor_of_another_layer(patch):
    """One place for all layers, though later chunks need every layer's."""
    right = AnchorKV.packed
    patch(AnchorKV, "packed", lambda self, layer, like, step: right(self, 0, like, step))


def anchor_counted_twice(patch):
    right = starattn.encode.accumulate_tiles

    def twice(q, kv, given, into, attend):
        right(q, kv, given, into, attend)
        if kv.tokens == ANCHOR:
            right(q, kv, given, into, attend)

    patch(starattn.encode, "accumulate_tiles", twice)


WORLD_SHARED = Scenario("world")
TWO_EACH = Scenario("rank", world=2)
FAULTS = {
    causal_on_every_rank: Scenario(),
    partials_weighted_by_each_other: Scenario(),
    anchor_kept_in_the_cache: Scenario(),
    question_after_the_padded_length: Scenario(),
    anchor_one_position_later: Scenario(),
    anchor_directly_before_its_block: Scenario(),
    blocks_restart_at_zero: Scenario(),
    blocks_right_behind_their_anchor: Scenario(),
    remainder_padded: Scenario(),
    remainder_dropped: Scenario(),
    anchor_not_seen: Scenario(),
    first_block_behind_an_anchor_too: Scenario(),
    blocks_of_a_rank_see_each_other: TWO_EACH,
    broadcast_not_awaited: WORLD_SHARED,
    anchor_of_another_layer: Scenario("rank", world=2, chunk_tokens=5),
    anchor_counted_twice: WORLD_SHARED,
}


@pytest.mark.parametrize("scenario", sorted(set(FAULTS.values()), key=str), ids=str)
def test_without_a_fault_the_bound_holds(scenario):
    error, right = outcome(scenario)
    assert error <= BOUND
    assert right


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_caught(fault, monkeypatch):
    fault(monkeypatch.setattr)
    error, _ = outcome(FAULTS[fault])
    assert error >= 100 * BOUND


@pytest.mark.parametrize("query", [2, 3, 12])
def test_causal_on_every_rank_shows_from_two_question_tokens(query, monkeypatch):
    causal_on_every_rank(monkeypatch.setattr)
    error, _ = outcome(Scenario(query=query))
    assert error >= 100 * BOUND


def test_causal_on_every_rank_is_invisible_with_one_question_token(monkeypatch):
    """Which is why every question elsewhere in these tests is longer."""
    causal_on_every_rank(monkeypatch.setattr)
    error, right = outcome(Scenario(query=1))
    assert error <= BOUND
    assert right
