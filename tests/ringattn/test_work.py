"""python -m pytest tests/ringattn/test_work.py

What a rank is said to compute is what its tiles hold, and is known at once for any document.
"""

import time
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from ringattn import RingStrategy
from seqpar import Span, pairs

LAYOUTS = st.sampled_from(["zigzag", "striped", "contiguous"])


@given(LAYOUTS, st.integers(1, 5), st.data(), st.integers(1, 90), st.integers(1, 12))
def test_work_is_what_the_tiles_hold(layout, world, data, tokens, chunk):
    place = SimpleNamespace(rank=data.draw(st.integers(0, world - 1)), world_size=world)
    strategy = RingStrategy(place, layout=layout, chunk_tokens=chunk)
    for extension in strategy.plan([Span(0, tokens, ((),) * world)])[1]:
        (alone,) = extension.plan.texts
        steps = (*extension.plan.new_steps(), *alone.past_kv_steps())
        assert extension.work.pairs == sum(pairs(tile) for step in steps for tile in step.tiles)


def test_thousands_of_chunks_are_planned_at_once():
    strategy = RingStrategy(SimpleNamespace(rank=0, world_size=2), chunk_tokens=8)
    started = time.process_time()
    _, plan = strategy.plan([Span(0, 60_000, ((), ()))])
    assert sum(extension.work.tokens for extension in plan) == 30_000
    assert time.process_time() - started < 5
