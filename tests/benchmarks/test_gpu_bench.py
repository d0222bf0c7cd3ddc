"""python -m pytest tests/benchmarks/test_gpu_bench.py

The GPU benchmark without a GPU: its counts, its tables, its budget, and every section's work on
the CPU at tiny sizes, timed by a timer that only counts.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks.gpu import ceilings, decode, encode, merging, model, report, ring, timing
from benchmarks.gpu.__main__ import NEEDS_GPU, SHARES, guarded, main, measure, parser
from benchmarks.gpu.timing import Bench, Budget, DeviceLost, Section
from launch.circumstances import circumstances
from localflash import DenseKV, attend
from seqpar import Layout, pairs, ring_steps

CALL_S = 0.5


class FakeTimer:
    """Does the work once for each set of inputs, and says that a call takes half a second."""

    def __init__(self):
        self.calls = 0

    def seconds(self, work, inputs=1):
        for index in range(inputs):
            work(index)
        self.calls += inputs
        return CALL_S

    called = seconds

    def once(self, work):
        return self.seconds(lambda _: work())


class Clock:
    """Seconds pass when somebody looks."""

    def __init__(self, each=0.0):
        self.now, self.each = 0.0, each

    def __call__(self):
        self.now += self.each
        return self.now


@pytest.fixture
def bench():
    return Bench("cpu", FakeTimer(), Budget(1e6, Clock()), copy=1e9, matmul=1e12)


@pytest.fixture(autouse=True)
def _small_sets(monkeypatch):
    """Half a gigabyte of inputs is for cards."""
    for module in (encode, decode):
        monkeypatch.setattr(module, "sets_of", lambda nbytes: 2)


TINY = encode.Shape(96, 16, 4, 2, causal=True)


# -- counts ------------------------------------------------------------------------------


def test_attention_is_counted_by_visible_pairs():
    causal, full = (encode.Shape(5, 3, 4, 2, c) for c in (True, False))
    assert (causal.pairs, full.pairs) == (15, 25)
    assert full.flops == 4 * 4 * 3 * 25  # two products, a multiplication and an addition each
    assert causal.label == "d3 g2 causal 5"
    assert encode.Shape(8192, 128, 32, 8, False).label == "d128 g4 full 8K"


def test_the_ring_has_as_many_pairs_as_the_call_that_it_is_measured_against():
    layout = Layout("zigzag", 0, 96, 8)
    runs = [layout.runs(rank) for rank in range(8)]
    each = [
        sum(pairs(tile) for step in ring_steps(rank, runs, runs) for tile in step.tiles)
        for rank in range(8)
    ]
    assert sum(each) == TINY.pairs
    assert max(each) == min(each)


def test_the_8b_llama_is_counted_exactly():
    llama = model.Llama()
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert llama.linear_weights == 32 * layer == 6_979_321_856
    assert llama.flops(2) == 2 * 2 * 32 * layer + 32 * 4 * 4096 * 3


def test_linear_weights_are_those_of_the_model():
    llama = model.Llama(layers=2, hidden=32, heads=4, kv_heads=2, mlp=48, vocab=20)
    made = llama.make("cpu", torch.bfloat16, 64)
    layers = made.get_decoder().layers
    counted = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    assert counted == llama.linear_weights
    assert made.dtype == torch.bfloat16


def test_bytes_are_those_that_must_be_moved():
    assert ceilings.copy_bytes(10) == 20
    assert ceilings.matmul_flops(3) == 54
    out, lse = 7 * 3 * 5 * 4, 7 * 3 * 4
    assert merging.into_bytes(7, 3, 5) == 3 * (out + lse)
    assert merging.many_bytes(8, 7, 3, 5) == 9 * (out + lse)
    case = decode.Cached(1024, 2, 8, 2)
    pool = decode.pool_of(case, "cpu")
    assert case.kv_bytes == pool.k.nbytes + pool.v.nbytes == pool.dense().nbytes
    assert case.label == "g4 b2 1K"


def test_sets_of_inputs_do_not_fit_in_a_cache():
    assert timing.sets_of(100, limit=1000) == 10
    assert timing.sets_of(2000, limit=1000) == timing.sets_of(1000, limit=1000) == 1


def test_every_case_that_is_asked_for_is_there():
    shapes = encode.shapes()
    assert len(set(shapes)) == 2 * 2 * 2 * 4
    assert shapes[0].dim == 128 and {s.tokens for s in shapes} == {8192, 16384, 32768, 131072}
    assert {s.heads for s in shapes if s.tokens == 131072} == {8}
    cases = decode.cases()
    assert len(set(cases)) == 4 * 2 * 2
    assert {c.label for c in cases} >= {"g8 b1 1M", "g4 b16 32K"}
    assert {(q.group, q.rows) for q in decode.questions()} == {(8, 4), (4, 8)}


# -- time --------------------------------------------------------------------------------


def test_a_part_of_a_budget_ends_with_the_whole():
    clock = Clock()
    budget = Budget(100, clock)
    part, late = budget.part(30), budget.part(300)
    assert (part.left, late.left) == (30, 100)
    clock.now = 40
    assert (part.left, budget.left) == (-10, 60)
    assert budget.part(-5).left == 0


def test_what_there_is_no_time_for_is_said(bench):
    clock = Clock(each=1.0)
    late = replace(bench, budget=Budget(7.0, clock))
    section = encode.run(late, [TINY] * 3, ["torch"], peers={})
    assert section.rows and section.skipped
    assert len(section.rows) + len(section.skipped) == 3
    assert "skipped: d16 g2 causal 96" in report.table([section])


def test_one_back_end_does_not_take_the_time_of_all():
    clock, section = Clock(), Section("encode", "")
    shares = timing.Shares(Budget(100, clock))

    def slow():
        clock.now += 20
        fails("after long")

    for expected in (False, False, True, True):
        assert shares.used_up("flex", section) == expected
        section.attempt("cell", lambda: shares.take("flex", slow))
        assert not shares.used_up("torch", section)
    assert section.skipped[0] == "flex: stopped after 40 s, its share of the time"


def test_no_section_begins_without_time(bench):
    over = replace(bench, budget=Budget(0.0, Clock()))
    for name in SHARES.keys() - {"model"}:
        section = SHARES[name][1](over)
        assert not section.rows and section.skipped and not section.failed, name
    assert over.timer.calls == 0


class FakeCard:
    """A device clock; a call takes `each_s` on it."""

    def __init__(self, each_s):
        self.now, self.each_s, self.slept, self.calls = 0.0, each_s, 0, []

    def work(self, index):
        self.calls.append(index)
        self.now += self.each_s

    def sleep(self, cycles):
        self.slept += 1
        self.now += cycles / 2e9

    def event(self, enable_timing):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, card):
        self.card = card

    def record(self):
        self.at = self.card.now

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


@pytest.mark.parametrize(("each_s", "most"), [(20e-6, 450), (3e-3, 60), (0.4, 4)])
def test_the_event_timer_leaves_the_wait_and_the_first_call_out(monkeypatch, each_s, most):
    card = FakeCard(each_s)
    monkeypatch.setattr(torch.cuda, "Event", card.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", card.sleep)
    timer = timing.EventTimer()
    assert timer.seconds(card.work, 3) == pytest.approx(each_s)
    assert len(card.calls) <= most
    assert {0, 1} <= set(card.calls) <= {0, 1, 2}
    assert bool(card.slept) == (each_s < 5e-3)
    assert timer.called(card.work, 2) == pytest.approx(each_s)
    assert timer.once(lambda: card.work(0)) == pytest.approx(each_s)


# -- failures ----------------------------------------------------------------------------


def fails(message):
    raise RuntimeError(message)


def test_a_failing_cell_is_one_line():
    section = Section("encode", "")
    assert section.attempt("one", lambda: fails("\n out of memory\nlong trace")) is None
    assert section.attempt("two", lambda: fails("out of memory")) is None
    assert section.attempt("three", lambda: 3) == 3
    assert section.failed == {"RuntimeError: out of memory": ["one", "two"]}
    assert len(timing.reason(RuntimeError("x" * 500))) == 120


def test_a_failing_back_end_does_not_stop_the_others(bench):
    section = encode.run(bench, [TINY], ["torch", "cudnn"], peers={})
    assert [row["backend"] for row in section.rows] == ["torch"]
    (why,) = section.failed
    assert "cudnn: needs a CUDA device" in why
    assert section.failed[why] == ["cudnn d16 g2 causal 96"]


def test_a_lost_device_ends_the_section_but_not_what_it_has(monkeypatch):
    section = Section("encode", "", rows=[{"case": "kept"}])
    monkeypatch.setattr(timing, "settle", lambda: fails("illegal memory access"))

    def cell():
        return section.attempt("inner", lambda: fails("first"))

    with pytest.raises(DeviceLost, match="after inner: RuntimeError: illegal") as lost:
        section.attempt("outer", cell)
    assert lost.value.section.rows == [{"case": "kept"}]


def test_a_section_that_fails_as_a_whole_says_so():
    section = guarded("ring", lambda: fails("no"))
    assert section.name == "ring" and section.failed == {"RuntimeError: no": ["ring"]}


def test_memory_that_is_not_there_is_not_asked_for(bench, monkeypatch):
    monkeypatch.setattr(decode, "free_bytes", lambda device: 1e6)
    section = decode.run(bench, [decode.Cached(131072, 16, 32, 8)], ["torch"])
    assert not section.rows
    assert next(iter(section.failed)).startswith("MemoryError: needs ")


# -- each section's work, on the CPU -----------------------------------------------------


def test_ceilings(bench):
    found = ceilings.run(bench, nbytes=4096, side=16)
    assert found.facts == {"copy": 8192 / CALL_S, "matmul": 2 * 16**3 / CALL_S}


def test_encode(bench):
    shapes = encode.shapes((64, 96), (16,), (2,), heads=4)
    peers = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-math": SDPBackend.MATH}
    section = encode.run(bench, shapes, ["torch", "reference"], peers)
    assert not section.failed
    assert len(section.rows) == len(shapes) * 4 == 16
    for row in section.rows:
        assert row["error"] < 1e-2 and row["of best other"] == 1.0
        assert row["of matmul"] == pytest.approx(row["TFLOP/s"])  # 1 TFLOP/s in this fixture
    assert bench.timer.calls == 2 * 16


def test_encode_sees_a_wrong_result(bench, monkeypatch):
    def flat(q, k, v, band, backend):
        out, lse = attend(q, k, v, None, backend=backend)
        return out, lse

    monkeypatch.setattr(encode, "attend", flat)
    section = encode.run(bench, [TINY], ["torch"], peers={})
    assert section.rows[0]["error"] > 0.1


def test_into(bench):
    section = encode.run_into(bench, [TINY, replace(TINY, causal=False)], ["torch", "reference"])
    assert not section.failed
    assert [row["ratio"] for row in section.rows] == [1.0] * 4


def test_decode(bench):
    cases = decode.cases((64, 128), (1, 2), (2, 4), heads=8)
    section = decode.run(bench, cases, ["torch", "reference"], pages=(8, 16))
    assert not section.failed and not section.skipped
    assert len(section.rows) == len(cases) * 3 * 2
    checked = [row for row in section.rows if " b1 " in row["case"]]
    assert all(row["error"] < 1e-2 for row in checked)  # paged or not: one document, any order
    assert all(row["error"] is None for row in section.rows if row not in checked)
    first = section.rows[0]
    assert first["GB/s"] == cases[0].kv_bytes / CALL_S / 1e9
    assert first["of copy"] == pytest.approx(first["GB/s"])


def test_pages_are_shuffled_and_each_is_read_once():
    torch.manual_seed(0)
    pool = decode.pool_of(decode.Cached(256, 2, 4, 2), "cpu")
    kv = pool.paged(16)
    assert kv.block_table.shape == (2, 16)
    assert sorted(kv.block_table.flatten().tolist()) == list(range(32))
    assert kv.block_table.flatten().tolist() != list(range(32))
    dense = pool.dense()
    assert isinstance(dense, DenseKV)
    assert dense.k_BTHD.data_ptr() == kv.k_pool.data_ptr()


def test_page_by_page_is_left_out_beyond_a_few(bench, monkeypatch):
    monkeypatch.setattr(decode, "MOST_PAGES", 4)
    section = decode.run(bench, [decode.Cached(128, 1, 8, 2)], ["torch", "reference"], pages=(16,))
    assert [(row["case"], row["backend"]) for row in section.rows] == [
        ("g4 b1 128 dense", "torch"),
        ("g4 b1 128 dense", "reference"),
        ("g4 b1 128 pages of 16", "reference"),
    ]
    assert section.skipped == [
        "torch: reads pages one call at a time, so over 4 pages are left out"
    ]


def test_questions(bench):
    section = decode.run_questions(bench, decode.questions((64,), heads=8), ["torch"], page=16)
    assert not section.failed
    assert [row["ratio"] for row in section.rows] == [1.0] * 4
    assert section.rows[0]["case"] == "4 questions g8 b1 64 dense"


def test_merge(bench):
    section = merging.run(bench, tokens=8, heads=2, dim=4, partials=3)
    assert not section.failed
    assert [row["merge"] for row in section.rows] == ["merge_into", "merge_many, N=3"]
    assert section.rows[1]["GB/s"] == merging.many_bytes(3, 8, 2, 4) / CALL_S / 1e9


def test_ring(bench):
    section = ring.run(bench, TINY, world=3, names=["torch", "reference"])
    assert not section.failed
    for row in section.rows:
        assert row["ratio"] == row["slowest rank"] == 3.0
        assert row["differs by"] < 1e-2


def test_every_simulated_rank_is_right():
    q, k, v = (x.float() for x in TINY.tensors("cpu"))
    whole, _ = attend(q, k, v, TINY.band)
    ranks = ring.Ranks(q, k, v, 4)
    for rank in range(4):
        assert (
            timing.relative_error(ranks.attend(rank, attend)[0], whole[:, ranks.own[rank]]) < 1e-5
        )


TINY_LLAMA = model.Llama(layers=2, hidden=64, heads=4, kv_heads=2, mlp=96, vocab=97)


def test_model(bench):
    sizes = model.Sizes(tokens=120, warm=40, chunks=(32, 64))
    attentions = {"sdpa-math": SDPBackend.MATH, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
    section = model.run(bench, TINY_LLAMA, sizes, ["torch", "reference"], attentions)
    assert not section.failed
    assert [row["by"] for row in section.rows] == [
        "Hugging Face sdpa-math",
        "Hugging Face sdpa-flash",
        "ringstar torch, chunks of 32",
        "ringstar torch, chunks of 64",
        "ringstar reference, chunks of 64",
    ]
    for row in section.rows:
        assert row["TFLOP/s"] == TINY_LLAMA.flops(120) / CALL_S / 1e12
        if row["ours"]:
            assert row["theirs / ours"] == 1.0
            assert row["differs by"] < 3e-2  # bf16 logits


def test_a_short_budget_takes_fewer_layers(bench, monkeypatch):
    made = []
    monkeypatch.setattr(model.Llama, "make", lambda self, *_: made.append(self.layers))
    for seconds in (model.FULL_RUN_S + 10, model.FULL_RUN_S - 10):
        section = model.run(replace(bench, budget=Budget(seconds, Clock())))
        assert f"llama of {made[-1]} layers" in section.what
    assert made == [32, model.FEWER_LAYERS]


# -- the report --------------------------------------------------------------------------


def test_best_other_is_the_best_of_the_others():
    rows = [{"TFLOP/s": speed, "error": error} for speed, error in ((4, 0.1), (8, 0.2), (2, 0.3))]
    encode.with_best(rows)
    assert [row["of best other"] for row in rows] == [0.5, 2.0, 0.25]
    assert [row["best other error"] for row in rows] == [0.2, 0.1, 0.1]
    (alone,) = encode.with_best([{"TFLOP/s": 1, "error": 0.1}])
    assert alone["of best other"] is None


def full_run() -> list[Section]:
    """As many rows as a card with eight back ends can give."""
    names = ["torch", "cudnn", "efficient", "triton", "flex", "fa3", "fa4", "flashinfer"]
    encoded, decoded = Section("encode", "x" * 80), Section("decode", "x" * 80)
    for shape in encode.shapes():
        encoded.rows += encode.with_best(
            [
                {"case": shape.label, "backend": name, "TFLOP/s": 512.3 + i, "error": 4.3e-3}
                | {"of matmul": 0.65}
                for i, name in enumerate([*names, *encode.PEERS])
            ]
        )
    for case in decode.cases():
        for how in ("dense", "pages of 64", "pages of 128"):
            decoded.rows += [
                {"case": f"{case.label} {how}", "backend": name, "of copy": 0.91, "error": 3e-3}
                for name in names
            ]
    rest = Section("model", "x" * 200, [{"by": "x" * 50, "seconds": 12.3, "ours": True}] * 12)
    for section in (encoded, decoded, rest):
        section.skipped = [f"cell {i} of some length or other" for i in range(100)]
        section.failed = {f"Error {i}: " + "x" * 110: ["cell"] * 9 for i in range(6)}
    return [encoded, decoded, rest]


def test_the_table_of_a_full_run_is_short():
    text = report.table(full_run())
    assert len(text) < 10_000
    assert "(cut)" not in text
    assert "|d128 g4 causal 32K|512|" in text
    assert "|g4 b16 512K pages of 128|0.91|" in text
    assert "- 100 skipped: cell 0 of" in text


def test_numbers_are_short():
    given = (1234.5, 0.12345, 7, "a", None, True)
    assert [report.number(x) for x in given] == ["1234", "0.123", "7", "a", "", "True"]
    assert report.spread([0.5, 0.9, 0.7]) == "0.70 (0.50 to 0.90)"
    assert report.spread([]) == ""


def test_circumstances_without_a_package():
    found = circumstances("x", ("torch", "no-such-package-here"))
    assert found["versions"].keys() == {"torch", "python"}


def tiny_ceilings(bench):
    return ceilings.run(bench, nbytes=4096, side=16)


def tiny_parts():
    return {
        "merge": (0.5, lambda bench: merging.run(bench, 8, 2, 4, 2)),
        "encode": (0.5, lambda bench: encode.run(bench, [TINY], ["torch"], {})),
        "ring": (0.5, lambda bench: fails("broken")),
    }


def test_a_run_writes_both_files(bench, tmp_path, capsys):
    folder = tmp_path / "new"
    assert measure(bench, tiny_parts(), 60.0, "the command", folder, tiny_ceilings) == 0
    (data,), (page,) = (folder.glob(f"*-gpu.{end}") for end in ("json", "md"))
    found = json.loads(data.read_text())
    assert list(found["sections"]) == ["ceilings", "merge", "encode", "ring"]
    assert found["circumstances"]["command"] == "the command"
    assert found["sections"]["ring"]["failed"] == {"RuntimeError: broken": ["ring"]}
    rate = found["sections"]["encode"]["rows"][0]["of matmul"]
    assert rate == pytest.approx(TINY.flops / (2 * 16**3))
    assert page.read_text() in capsys.readouterr().out


def test_a_lost_device_leaves_what_was_found(bench, tmp_path, capsys):
    def lose(bench):
        raise DeviceLost(Section("ring", "half", rows=[{"backend": "torch"}]), "cell", KeyError())

    parts = tiny_parts() | {"ring": (1.0, lose), "model": (1.0, lose)}
    assert measure(bench, parts, 60.0, "", tmp_path, tiny_ceilings) == 1
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["sections"]["ring"]["rows"] == [{"backend": "torch"}]
    assert found["sections"]["encode"]["rows"] and "model" not in found["sections"]
    assert "the device was lost" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out == NEEDS_GPU + "\n"


def test_help_and_arguments(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("--only", "--minutes", "--out", *SHARES))
    given = parser().parse_args(["--only", "ring", "model", "--minutes", "3", "--out", "x"])
    assert (given.only, given.minutes, str(given.out)) == (["ring", "model"], 3.0, "x")
    with pytest.raises(SystemExit):
        parser().parse_args(["--only", "rnig"])


def test_nothing_is_known_of_the_ceilings_before_they_are_measured():
    fresh = Bench("cpu", FakeTimer(), Budget(1.0))
    assert math.isnan(fresh.copy) and math.isnan(fresh.matmul)
