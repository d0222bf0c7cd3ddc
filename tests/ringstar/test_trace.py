"""python -m pytest tests/ringstar/test_trace.py

One trace of all ranks: well formed, complete, and of one mind with the metrics.
"""

import json
import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from localflash import Backend
from ringstar import LongContext, UserError
from ringstar.config import Config, ModelConfig, ProfileConfig, StarConfig, TransportConfig
from ringstar.exchange import bytes_on_rank_0
from ringstar.metrics import gather_integers
from ringstar.models import BoundModel
from ringstar.trace import check_profile
from ringstar.trace.chrome import TRANSFERS, RankTrace, trace_file
from ringstar.trace.clocks import Alignment, CudaClock, HostClock, clock_offset, measure_offset
from ringstar.trace.recorder import RankRecord, Recorder, Span
from ringstar.trace.summary import exposed, summary_lines
from seqpar import ThreadTransport
from seqpar.process import ProcessWorld
from tests.support.models import random_ids, tiny_folder
from tests.support.ranks import in_processes, in_threads
from tests.support.traces import bytes_sent, check_format, check_nesting, of_kind, read

NEW_TOKENS, LAYERS, CONTEXT = 6, 2, 101


def config_of(folder, path, world=3, **changes) -> Config:
    config = Config(
        model=ModelConfig(path=folder, dtype="float32"),
        transport=TransportConfig("threads", world, threads_per_rank=1),
        profile=ProfileConfig(str(path) if path else None),
    )
    config.encode.chunk_tokens = 20
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def run(runtime):
    """A document, logits after it, and an answer; with it, what every rank sent in all."""
    document = runtime.encode(random_ids(CONTEXT))
    runtime.logits(document, random_ids(4), last=2)
    answer = runtime.ask(document, random_ids(5), max_new_tokens=NEW_TOKENS)
    sent = runtime.ranks.run(lambda t: gather_integers(t, [t.counters.bytes_sent])[0])[0]
    runtime.close()
    return answer, sent


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("strategy", ["ring", "star"])
def test_everything_is_there_and_well_formed(strategy, world, tmp_path):
    config = config_of(tiny_folder("llama"), tmp_path, world)
    if strategy == "star":
        config.strategy = StarConfig(block_size=20)
    _, sent = run(LongContext.from_config(config))
    trace = read(tmp_path)
    check_format(trace)
    assert bytes_sent(trace, world) == sent
    assert {event["pid"] for event in of_kind(trace, "phase")} == set(range(world))
    for rank in range(world):
        phases = [event["name"] for event in of_kind(trace, "phase", rank)]
        encodes = [name for name in phases if name.startswith("encode chunk ")]
        assert encodes and len(encodes) == int(encodes[0].rpartition(" ")[2])
        rest = ["load", "encode", *encodes, "metrics", "score", "question", "decode", "metrics"]
        assert phases == rest
        forwards = of_kind(trace, "forward", rank)
        assert len(forwards) == len(encodes) + 1 + NEW_TOKENS
        assert len(of_kind(trace, "layer", rank)) == LAYERS * len(forwards)
        assert len(of_kind(trace, "attention", rank)) == LAYERS * len(forwards)
        assert len(of_kind(trace, "kernel", rank)) >= LAYERS * (1 + NEW_TOKENS)
    waits, transfers = of_kind(trace, "wait"), of_kind(trace, "transfer")
    assert len(waits) == len(transfers)
    assert all("received" in event["args"] for event in transfers)


def test_kernels_say_whose_keys_they_read(tmp_path):
    run(LongContext.from_config(config_of(tiny_folder("llama"), tmp_path)))
    encoding = [
        event["args"]
        for event in of_kind(read(tmp_path), "kernel", 1)
        if event["args"]["phase"] == "encode chunk 1 of 2"
    ]
    assert {args["source"] for args in encoding} == {0, 1, 2}
    assert all(args["queries"] and args["keys"] for args in encoding)


def test_nothing_is_in_the_way_when_nothing_is_recorded():
    runtime = LongContext.from_config(config_of(tiny_folder("llama"), None))
    for engine in runtime.group.engines.values():
        assert type(engine._transport) is ThreadTransport
        assert type(engine.model) is BoundModel
        assert engine._kernel == "torch"
        for layer in engine.model.model.get_decoder().layers:
            assert (len(layer._forward_pre_hooks), len(layer._forward_hooks)) == (1, 0)
    assert runtime._trace is None


def test_recording_changes_no_answer(tmp_path):
    folder = tiny_folder("llama")
    (traced, _), (plain, _) = (
        run(LongContext.from_config(config_of(folder, path))) for path in (tmp_path, None)
    )
    assert traced.ids == plain.ids
    assert torch.equal(traced.first_logits, plain.first_logits)
    assert traced.metrics.bytes_sent == plain.metrics.bytes_sent


def test_a_trace_is_bounded_and_says_what_is_left_out(tmp_path, caplog):
    folder, traces = tiny_folder("llama"), []
    caplog.set_level("INFO", logger="ringstar")
    for limit in (100_000, 50):
        profile = ProfileConfig(str(tmp_path), max_events=limit)
        _, sent = run(LongContext.from_config(config_of(folder, tmp_path, profile=profile)))
        traces.append(read(tmp_path))
    check_format(traces[1])
    assert "beyond profile.max_events=50 of a rank: " in caplog.text
    whole, bounded = (trace["otherData"]["ranks"] for trace in traces)
    assert list(map(counts, whole)) == list(map(counts, bounded))
    for rank, record in enumerate(bounded):
        had, kept = (complete(trace, rank) for trace in traces)
        assert len(kept) - len(of_kind(traces[1], "phase", rank)) == 50
        assert sum(record["dropped"].values()) == len(had) - len(kept)
        moved = [kinds["transfer"] for kinds in record["totals"].values() if "transfer" in kinds]
        assert sum(total["bytes_sent"] for total in moved) == sent[rank]


def counts(rank) -> dict[tuple[str, str], int]:
    """How many spans there were, kept or not, by phase and kind."""
    return {
        (phase, kind): total["count"]
        for phase, kinds in rank["totals"].items()
        for kind, total in kinds.items()
    }


def complete(trace, rank) -> list[dict]:
    return [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == rank]


def traced_process(transport, folder, path):
    config = config_of(folder, path, transport=TransportConfig())
    return run(LongContext.from_config(config, ProcessWorld(transport)))[1]


def test_processes_write_one_file(tmp_path):
    results = in_processes(2, traced_process, tiny_folder("llama"), tmp_path)
    trace = read(tmp_path)
    tracks = check_format(trace)
    assert {rank for rank, _ in tracks} == {0, 1}
    assert bytes_sent(trace, 2) == results[0]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    assert trace["otherData"]["transport"] == "gloo"
    assert len({rank["where"] for rank in trace["otherData"]["ranks"]}) == 2


def gathered(transport, sizes):
    return bytes_on_rank_0(transport, bytes([transport.rank]) * sizes[transport.rank])


@pytest.mark.parametrize("runner", [in_threads, in_processes])
def test_bytes_of_any_length_reach_rank_0(runner):
    sizes = [3, 0, 200_000]
    first, *others = runner(3, gathered, sizes)
    assert first == [bytes([rank]) * size for rank, size in enumerate(sizes)]
    assert others == [None, None]
    assert runner(1, gathered, [5]) == [[b"\0" * 5]]


def offset_of(transport, ahead_ns):
    before = transport.counters.bytes_sent
    measured = measure_offset(transport, lambda: time.perf_counter_ns() + ahead_ns[transport.rank])
    assert transport.counters.bytes_sent == before
    return measured


def test_clocks_of_other_machines_are_put_right():
    ahead = [0, 5_000_000_000, -3_000_000_000, 0]
    for (_, offset), want in zip(in_threads(4, offset_of, ahead), ahead, strict=True):
        assert abs(offset - want) < 50_000_000
    for _, offset in in_threads(3, offset_of, [7, 7, 7]):
        assert offset == 0  # exactly: they are the same


def test_an_offset_lies_between_what_both_know():
    assert clock_offset([110, 210], [130, 219], [10, 110], [20, 118]) == (92 + 109) // 2
    assert clock_offset([10], [30], [12], [28]) == 0


def test_a_clock_that_drifts_is_put_right_in_between():
    aligned = Alignment((1000, 100), (2000, 120))
    assert [aligned.on_rank_0(at) for at in (1000, 1500, 2000)] == [900, 1390, 1880]
    times = [aligned.on_rank_0(at) for at in range(1000, 2000)]
    assert times == sorted(times)


STEP_NS = 1_000_123


class FakeEvent:
    """A stand-in for a CUDA event: a time, and elapsed times as CUDA has them, in float32."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.now += STEP_NS
        self.at = FakeEvent.now

    def synchronize(self):
        return None

    def elapsed_time(self, later):
        return float(np.float32((later.at - self.at) / 1e6))


@pytest.fixture
def fake_cuda(monkeypatch):
    """The calls of `CudaClock`, on a machine without CUDA; the names that NVTX heard."""
    heard: list[str | None] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", heard.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: heard.append(None))
    return heard


def test_cuda_stamps_stay_exact_over_hours(fake_cuda, monkeypatch):
    clock = CudaClock(torch.device("cuda"))
    stamps = [clock.stamp() for _ in range(20_000)]
    times = [clock.nanoseconds(stamp) for stamp in stamps]
    assert times == sorted(times)
    steps = [b - a for a, b in pairwise(times)]
    assert max(abs(step - STEP_NS) for step in steps) < 1000
    FakeEvent.now += 3_600_000_000_000  # somebody thinks
    with monkeypatch.context() as patched:
        patched.setattr("ringstar.trace.clocks._PAUSE_NS", -1)
        stamps = [clock.stamp()]
    stamps += [clock.stamp() for _ in range(3)]
    steps = [b - a for a, b in pairwise(map(clock.nanoseconds, stamps))]
    assert max(abs(step - STEP_NS) for step in steps) < 1000
    assert abs(times[-1] - times[0] - 19_999 * STEP_NS) < 100_000


def test_a_run_timed_by_cuda_events_is_well_formed(fake_cuda, monkeypatch, tmp_path):
    """Only the clock is CUDA's here: what it would be on a GPU was not run."""
    monkeypatch.setattr(
        "ringstar.trace.collect.clock_of", lambda _: CudaClock(torch.device("cuda"))
    )
    run(LongContext.from_config(config_of(tiny_folder("llama"), tmp_path, world=1)))
    trace = read(tmp_path)
    check_format(trace)
    assert len(fake_cuda) == 2 * fake_cuda.count(None)
    assert {"layer 0", "attention", "torch"} <= set(fake_cuda)


def record_of(*spans) -> RankTrace:
    recorder = Recorder(HostClock(), 100)
    made = [Span(*span, details={}) for span in spans]
    for span in made:
        recorder._count(span)
    return RankTrace(0, "here", RankRecord(made, recorder._totals, {"kernel": 1200}))


def test_the_summary_is_of_waiting_in_phases():
    rank = record_of(
        ("phase", "encode chunk 1 of 2", "encode chunk 1 of 2", 0, 3_000_000_000),
        ("wait", "shift", "encode chunk 1 of 2", 0, 500_000_000),
        ("phase", "encode chunk 2 of 2", "encode chunk 2 of 2", 0, 1_000_000_000),
        ("phase", "metrics", "metrics", 0, 9_000_000_000),
        ("wait", "all_gather", "metrics", 0, 9_000_000_000),
        ("phase", "decode", "decode", 0, 1_000_000_000),
        ("wait", "all_gather", "decode", 0, 250_000_000),
    )
    assert exposed(rank) == {"encode": (0.5, 4.0), "decode": (0.25, 1.0)}
    _, head, row, dropped = summary_lines([rank], 7)
    assert head.split() == ["rank", "encode", "decode", "all"]
    assert (
        " ".join(row.split()) == "0 0.50 of 4.00 (12.5%) 0.25 of 1.00 (25.0%) 0.75 of 5.00 (15.0%)"
    )
    assert dropped.endswith("max_events=7 of a rank: 1,200 kernel")


def test_the_columns_of_long_work_stay_apart():
    rank = record_of(
        ("phase", "decode", "decode", 0, 12_345_600_000_000),
        ("wait", "shift", "decode", 0, 1_234_500_000_000),
    )
    _, head, row, _ = summary_lines([rank], 7)
    assert row.count("  1234.50 of 12345.60 (10.0%)") == 2
    assert len(head) == len(row)


def test_kv_that_is_brought_back_is_in_a_phase(tmp_path):
    """Before a question and before an encode that goes on from it."""
    config = config_of(tiny_folder("llama"), tmp_path, world=2)
    config.cache.offload, config.cache.max_bytes, config.cache.page_tokens = "disk", "90KB", 16
    runtime = LongContext.from_config(config)
    texts = [random_ids(200, seed=seed) for seed in (1, 2)]
    documents = [runtime.encode(text) for text in texts]
    assert not documents[0].shards[0].is_here
    runtime.ask(documents[0], random_ids(5), max_new_tokens=2)
    assert not documents[1].shards[0].is_here
    runtime.encode([*texts[1], *random_ids(20, seed=3)])
    runtime.close()
    trace = read(tmp_path)
    check_format(trace)
    begun = min(event["ts"] for event in of_kind(trace, "phase", 0) if event["name"] == "encode")
    waits = [event for event in of_kind(trace, "wait", 0) if event["ts"] >= begun]
    named = {event["args"]["phase"] for event in waits}
    assert "" not in named and {"question", "encode"} <= named


def test_transfers_that_overlap_have_tracks_of_their_own():
    rank = record_of(
        ("transfer", "a", "", 0, 10), ("transfer", "b", "", 5, 12), ("transfer", "c", "", 10, 20)
    )
    trace = json.loads(trace_file([rank], {}))
    check_format(trace)
    assert [e["tid"] - TRANSFERS for e in trace["traceEvents"] if e["ph"] == "X"] == [0, 0, 1]


def test_of_spans_that_begin_together_the_outer_one_comes_first():
    rank = record_of(
        ("kernel", "k", "", 5, 7), ("attention", "a", "", 5, 8), ("layer", "l", "", 5, 9)
    )
    trace = json.loads(trace_file([rank], {}))
    check_format(trace)
    assert [e["name"] for e in trace["traceEvents"] if e["ph"] == "X"] == ["l", "a", "k"]


def test_the_check_of_the_format_sees_what_is_wrong():
    within = {"ts": 0.0, "dur": 4.0}
    check_nesting([within, {"ts": 1.0, "dur": 3.0}, {"ts": 4.0, "dur": 1.0}])
    for wrong in ({"ts": 1.0, "dur": 3.001}, {"ts": -1.0, "dur": 0.5}):
        with pytest.raises(AssertionError):
            check_nesting([within, wrong])


def test_backends_are_taken_as_they_are():
    import localflash

    q = torch.randn(1, 3, 2, 4)
    asked = []

    def attend(*args):
        asked.append(args)
        return q, q

    mine = Backend("mine", lambda _: None, attend)
    assert localflash.attend(q, q, q, backend=mine) == (q, q)
    assert len(asked) == 1


def test_a_folder_that_cannot_be_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    for path, why in ((tmp_path / "file", "folder"), (tmp_path / "file" / "below", "written")):
        with pytest.raises(UserError, match=f"profile.path=.*{why}"):
            check_profile(ProfileConfig(str(path)))
    (tmp_path / "taken" / "trace.json").mkdir(parents=True)
    for path, why in (("", "allowed: a folder"), (tmp_path / "taken", "remove it")):
        with pytest.raises(UserError, match=f"profile.path=.*{why}"):
            LongContext.from_config(
                config_of(tiny_folder("llama"), None, profile=ProfileConfig(str(path)))
            )
    check_profile(ProfileConfig(str(tmp_path / "new" / "folder")))
    assert (tmp_path / "new" / "folder").is_dir()
    check_profile(ProfileConfig())
