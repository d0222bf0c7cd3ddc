"""python -m pytest tests/ringstar/test_paging.py"""

import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
)

from localflash import DenseKV
from ringstar.models import LayerShape
from ringstar.paging import CacheFull, PagePool, PageTable, ShardedCache, Storage
from seqpar import Run, positions, token_count

PAGE, WINDOW = 4, 7
FLOAT = Storage(torch.float32, torch.device("cpu"))
# two layers of one window, one of the other: 1 KV head of 2
SHAPES = {
    None: [LayerShape(0, 1, (2, 2)), LayerShape(2, 1, (2, 2))],
    WINDOW: [LayerShape(1, 1, (2, 2))],
}
PAGE_BYTES = {None: PAGE * 2 * 2 * 2 * 4, WINDOW: PAGE * 2 * 2 * 4}


def pool(limit=None, storage=FLOAT):
    return PagePool(SHAPES, storage, PAGE, limit)


def marked(values):
    """KV that says which number each token has."""
    k_BTKD = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1).expand(1, -1, 1, 2)
    return DenseKV(k_BTKD, -k_BTKD)


def written(table, runs, values):
    at = table.append(runs)
    for layer in table.layers:
        table.write(layer, at, marked([value + layer / 8 for value in values]))


def read(table, layer):
    """The number of each token, which keys and values must agree about."""
    k_BTKD, v_BTKD = table.view(layer, 0, table.tokens).tensors
    assert torch.equal(k_BTKD, -v_BTKD)
    return (k_BTKD[0, :, 0, 0] - layer / 8).tolist()


runs_of = st.lists(
    st.builds(
        lambda start, count, step: Run(start, start + (count - 1) * step + 1, step),
        st.integers(0, 30),
        st.integers(1, 9),
        st.integers(1, 4),
    ),
    max_size=4,
)


class Pages(RuleBasedStateMachine):
    """Texts in a pool within a budget, beside lists of what each must hold."""

    texts = Bundle("texts")
    LIMIT = 40 * PAGE_BYTES[None]

    def __init__(self):
        super().__init__()
        self.pool = pool(self.LIMIT)
        self.number, self.held = 0, []

    def numbers(self, count):
        self.number += count
        return list(range(self.number - count, self.number))

    @rule(target=texts)
    def begin(self):
        text = {
            "tables": {window: PageTable(group) for window, group in self.pool.groups.items()},
            "holds": {window: [] for window in self.pool.groups},
        }
        self.held.append(text)
        return text

    @rule(text=texts, window=st.sampled_from([None, WINDOW]), runs=runs_of)
    def write(self, text, window, runs):
        table, holds = text["tables"][window], text["holds"][window]
        values = self.numbers(token_count(tuple(runs)))
        fits = not self.pool.missing({window: table.needs(len(values))})
        try:
            written(table, tuple(runs), values)
        except CacheFull:
            assert not fits
            return
        holds += zip(positions(tuple(runs)), values, strict=True)

    @rule(text=texts, window=st.sampled_from([None, WINDOW]), tokens=st.integers(1, 30))
    def reserve(self, text, window, tokens):
        table = text["tables"][window]
        fits = not self.pool.missing({window: table.needs(tokens)})
        try:
            table.reserve(tokens, ahead=tokens)
        except CacheFull:
            assert not fits
            return
        assert not table.lacks(tokens)

    @rule(text=texts, tokens=st.integers(1, 30), windows=st.permutations([None, WINDOW]))
    def reserve_all(self, text, tokens, windows):
        tables = text["tables"]
        needs = {window: tables[window].needs(tokens) for window in windows}
        if self.pool.missing(needs):
            return
        self.pool.plan(needs)
        for window in windows:  # room that was found for all is there for each
            tables[window].reserve(tokens, ahead=tokens)

    @rule(text=texts, position=st.integers(0, 40))
    def drop(self, text, position):
        table, holds = text["tables"][WINDOW], text["holds"][WINDOW]
        try:
            table.drop_before(position)
        except CacheFull:
            return
        holds[:] = [pair for pair in holds if pair[0] >= position]

    @rule(text=texts, window=st.sampled_from([None, WINDOW]), data=st.data())
    def truncate(self, text, window, data):
        table, holds = text["tables"][window], text["holds"][window]
        kept = data.draw(st.integers(0, len(table.runs)))
        runs = table.runs[:kept]
        table.truncate(runs)
        del holds[token_count(runs) :]

    @rule(text=texts, ahead=st.integers(0, 9))
    def compact(self, text, ahead):
        text["tables"][WINDOW].compact(ahead)

    @rule(target=texts, text=texts, below=st.integers(0, 60))
    def fork(self, text, below):
        needs = {window: table.fork_needs(below) for window, table in text["tables"].items()}
        fits = not self.pool.missing(needs)
        self.pool.plan(needs)
        try:
            tables = {window: table.fork(below) for window, table in text["tables"].items()}
        except CacheFull:
            assert not fits
            return self.begin()
        holds = {
            window: [pair for pair in pairs if pair[0] < below]
            for window, pairs in text["holds"].items()
        }
        self.held.append({"tables": tables, "holds": holds})
        return self.held[-1]

    @rule(text=consumes(texts))
    def release(self, text):
        for table in text["tables"].values():
            table.release()
        self.forget(text)

    @rule(text=consumes(texts))
    def drop_without_a_word(self, text):
        self.forget(text)
        text["tables"].clear()

    def forget(self, text):
        self.held = [each for each in self.held if each is not text]

    @invariant()
    def every_text_has_what_it_was_given(self):
        for text in self.held:
            for window, table in text["tables"].items():
                held = text["holds"][window]
                assert positions(table.runs) == [position for position, _ in held]
                for layer in table.layers:
                    assert read(table, layer) == [value for _, value in held]

    @invariant()
    def no_page_is_lost_or_had_twice(self):
        used = self.pool.allocated_nbytes
        assert used <= self.LIMIT
        for window, group in self.pool.groups.items():
            tables = [text["tables"][window] for text in self.held]
            pages = [page for table in tables for page in table.pages]
            assert len(set(pages)) + group.ledger.free == group.ledger.pages
            for table in tables:
                assert len(set(table.pages)) == len(table.pages)
            for page in set(pages):
                assert group.ledger.is_shared(page) == (pages.count(page) > 1)
            used -= group.ledger.pages * PAGE_BYTES[window]
        assert used == 0

    @rule(text=texts)
    def less_than_a_page_is_wasted(self, text):
        """Once nothing is reserved; a window may also have skipped the beginning of a page."""
        for window, table in text["tables"].items():
            table.trim()
            wasted = len(table.pages) * PAGE - table.tokens
            assert 0 <= wasted < (PAGE if window is None else 2 * PAGE - 1)

    def teardown(self):
        for text in self.held:
            text["tables"].clear()
        gc.collect()
        assert self.pool.allocated_nbytes == 0


TestPages = Pages.TestCase
TestPages.settings = settings(
    max_examples=40,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_generated_tokens_that_go_round_are_one_run():
    table = PageTable(pool().groups[None])
    for position in range(100, 400, 3):
        table.append((Run(position, position + 1),))
    assert table.runs == (Run(100, 398, 3),)


def test_what_is_written_is_read_as_one_view():
    table = PageTable(pool().groups[None])
    written(table, (Run(0, 30),), list(range(30)))
    view = table.view(0, 1, 29)
    assert isinstance(view, DenseKV) and view.k_BTHD.is_contiguous()
    assert view.k_BTHD.data_ptr() == table.view(0, 0, 30).tensors[0][:, 1:].data_ptr()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", [None, torch.int8])
def test_a_cpu_has_each_head_in_one_piece_and_others_each_token(device, kind):
    storage = Storage(torch.float32, torch.device(device), kind)
    held = PageTable(PagePool({None: [LayerShape(0, 3, (8, 8))]}, storage, PAGE).groups[None])
    held.append((Run(0, 6),))
    for tensor in held.view(0, 1, 6).tensors:
        assert tensor.shape[:3] == (1, 5, 3)
        next_token, next_head = tensor.stride()[1:3]
        numbers = tensor[0, 0, 0].numel()
        nearer, farther = (next_token, next_head) if device == "cpu" else (next_head, next_token)
        assert nearer == numbers < farther


def test_what_was_planned_for_lies_in_one_row():
    """Two texts grow in turn: each in the room that was left behind it."""
    group = pool().groups[None]
    first, second = PageTable(group), PageTable(group)
    for table in (first, second):
        table.reserve(10, ahead=40)
        written(table, (Run(0, 10),), list(range(10)))
    for position in range(10, 50):
        for table in (first, second):
            written(table, (Run(position, position + 1),), [position])
    assert isinstance(first.view(0, 0, 50), DenseKV) and isinstance(second.view(0, 0, 50), DenseKV)


def test_pages_in_several_rows_are_read_piece_by_piece():
    group = pool().groups[None]
    tables = [PageTable(group) for _ in range(2)]
    for position in range(24):
        for table in tables:
            written(table, (Run(position, position + 1),), [position])
    view = tables[0].view(0, 0, 24)
    assert len(list(view.segments(torch.float32))) > 1
    assert read(tables[0], 0) == read(tables[1], 0) == list(range(24))


def test_full_pages_are_shared_and_a_tail_is_copied():
    made = pool()
    text = PageTable(made.groups[None])
    written(text, (Run(0, 18),), list(range(18)))
    before = made.allocated_nbytes
    other = text.fork(18)
    assert other.pages[:4] == text.pages[:4] and other.pages[4] != text.pages[4]
    assert made.allocated_nbytes == before + PAGE_BYTES[None]
    written(other, (Run(18, 19),), [99])
    assert read(text, 0) == list(range(18)) and read(other, 0) == [*range(18), 99]


def test_a_shared_page_is_copied_before_it_is_written():
    text = PageTable(pool().groups[None])
    written(text, (Run(0, 8),), list(range(8)))
    other = text.fork(8)
    assert other.pages == text.pages
    text.truncate((Run(0, 6),))
    written(text, (Run(20, 22),), [20, 21])
    assert read(text, 0) == [*range(6), 20, 21] and read(other, 0) == list(range(8))
    assert other.pages[0] == text.pages[0] and other.pages[1] != text.pages[1]


def test_the_beginning_of_a_zigzag_keeps_its_order():
    text = PageTable(pool().groups[None])
    written(text, (Run(0, 10), Run(30, 40)), [*range(10), *range(30, 40)])
    other = text.fork(33)
    assert positions(other.runs) == read(other, 0) == [*range(10), 30, 31, 32]
    assert other.pages[:2] == text.pages[:2]


def test_what_a_window_left_is_given_back_page_by_page():
    made = pool()
    table = PageTable(made.groups[WINDOW])
    written(table, (Run(0, 20),), list(range(20)))
    table.drop_before(9)
    assert len(table.pages) == 3 and read(table, 1) == list(range(9, 20))
    slab = table.pages
    table.compact(ahead=0)
    assert table.pages != slab and made.allocated_nbytes == 3 * PAGE_BYTES[WINDOW]


def test_one_window_leaves_memory_that_is_planned_for_another():
    many = pool(13 * PAGE_BYTES[None])
    texts = [PageTable(many.groups[None]) for _ in range(10)]
    texts[0].reserve(PAGE, ahead=9 * PAGE)
    for text in texts[1:]:
        text.reserve(PAGE)
    for text in texts[::2]:
        text.release()  # five pages, no two in a row
    needs = {None: 3, WINDOW: 6}
    assert many.missing(needs) == 0 < many.missing({None: 3, WINDOW: 7})
    many.plan(needs)
    text = ShardedCache(many)
    text.of(None).reserve(3 * PAGE, ahead=PAGE)
    text.of(WINDOW).reserve(6 * PAGE)
    assert many.allocated_nbytes == many.limit


def test_nothing_is_taken_beyond_the_budget():
    made = pool(5 * PAGE_BYTES[None])
    first, second = (PageTable(made.groups[None]) for _ in range(2))
    written(first, (Run(0, 12),), list(range(12)))
    assert made.missing({None: 2}) == 0 and made.missing({None: 3}) == PAGE_BYTES[None]
    with pytest.raises(CacheFull, match="are needed"):
        second.reserve(9)
    assert made.missing({None: 2}) == 0, "what was not granted is not held"
    first.release()
    second.reserve(9)


@given(st.integers(1, 40), st.integers(0, 40))
def test_a_copy_is_another_text(tokens, more):
    cache = ShardedCache(pool())
    cache.append((Run(0, tokens),))
    for window, layer, _ in cache.all_layers():
        cache.of(window).write(layer, 0, marked(list(range(tokens))))
    other = cache.fork(1 << 40)
    if more:
        cache.append((Run(tokens, tokens + more),))
        for window, layer, _ in cache.all_layers():
            cache.of(window).write(layer, tokens, marked([-1] * more))
    for _, layer, kv in other.all_layers():
        assert kv.tensors[0][0, :, 0, 0].tolist() == list(range(tokens)), layer


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_quantised_pages_hold_what_was_written(kind):
    storage = Storage(torch.float32, torch.device("cpu"), kind)
    made = PagePool({None: [LayerShape(0, 3, (16, 16))]}, storage, PAGE)
    table, generator = PageTable(made.groups[None]), torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 11, 3, 16, generator=generator) for _ in range(2))
    kv = storage.packed(k, v)
    table.write(0, table.append((Run(0, 11),)), kv)
    for ours, theirs in zip(table.view(0, 0, 11).tensors, kv.tensors, strict=True):
        assert torch.equal(ours.float(), theirs.float())
    assert table.nbytes == kv.nbytes == 11 * 3 * 2 * (16 + 2)
