"""python -m pytest tests/launch/bench/test_bench.py

launch.bench: the grid, what is made of times, comparisons, and whole runs.
"""

import json
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.bench import __main__ as bench_main
from launch.bench.__main__ import main
from launch.bench.against import changes, read_earlier
from launch.bench.attention import PEER, why_not
from launch.bench.cells import (
    AttentionTimes,
    Ceilings,
    LineReader,
    Load,
    Measured,
    add_line,
    all_attention,
    all_rounds,
    highest,
    measured,
)
from launch.bench.plan import make_plan, prompts_of, read_strategies
from launch.bench.result import NOT_DONE, Floor, row_of
from launch.bench.tables import block, tables
from launch.faults import FAULT, INTERRUPTED, USER
from launch.options import BENCH
from ringstar import UserError
from ringstar.config import DenseConfig, ModelConfig, RingConfig, StarConfig
from ringstar.models import find_model
from ringstar.models.work import LayerWork, ModelWork, work_of
from ringstar.timed import Timed
from tests.support.commands import TORCHRUN, python
from tests.support.models import DYNAMIC, tiny_folder

TOKEN = 2 * 2 * 2 * 16 * 4  # bytes of a tiny model's KV
SMALL = ["bench.lengths=40,72", "bench.requests=2", "bench.new_tokens=4", "bench.question_tokens=4"]


def plan_of(folder: str, *arguments: str):
    changed = {argument.partition("=")[0] for argument in arguments}
    usual = [a for a in (*SMALL, "bench.peers=none") if a.partition("=")[0] not in changed]
    config = BENCH.parse([f"model.path={folder}", *usual, *arguments])
    files = find_model(config.model)
    return config, files, make_plan(config, files)


# -- the grid ----------------------------------------------------------------------------------


def test_every_combination_is_a_cell(bare):
    _, _, plan = plan_of(
        bare,
        *("bench.strategy=dense", "bench.strategy=ring layout=striped"),
        *("bench.worlds=3,1", "bench.batches=2,1"),
    )
    loads = [Load(length, batch) for batch in (1, 2) for length in (40, 72)]
    both = [("dense", 1), ("ring striped", 1), ("ring striped", 3)]
    assert list(plan.cells()) == [(*who, load) for who in both for load in loads]


def test_strategies_are_read_as_they_are_written():
    dense, ring, striped, star, fixed = read_strategies(
        [
            "dense",
            "ring",
            "ring layout=striped past_by=kv",
            "star block_size=1/4",
            "star block_size=1K",
        ]
    )
    assert dense.strategy(9) == DenseConfig()
    assert ring.strategy(9) == RingConfig()
    assert striped.strategy(9) == RingConfig(layout="striped", past_by="kv")
    assert star.strategy(1001) == StarConfig(block_size="251")
    assert fixed.strategy(9) == StarConfig(block_size="1K")
    labels = [each.label for each in (dense, ring, striped, star, fixed)]
    assert labels == ["dense", "ring", "ring striped kv", "star 1/4", "star 1K"]
    assert [each.label for each in read_strategies([])] == ["ring", "star 1/4"]
    (plain,) = read_strategies(["star"])  # a block for each rank
    assert (plain.label, plain.strategy(9)) == ("star", StarConfig())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["bench.strategy=rung"], "bench.strategy=rung: allowed: dense, ring, star"),
        (["bench.strategy=ring layuot=striped"], "layuot=striped: allowed: FIELD=VALUE of layout"),
        (["bench.strategy=ring layout=round"], "layout=round: allowed: zigzag"),
        (["bench.strategy=dense layout=zigzag"], "layout=zigzag: allowed: dense alone"),
        (["bench.strategy=star anchor_size=4"], "block_size is needed"),
        (["bench.strategy=star share_anchor=rank"], "block_size is needed"),
        (["bench.strategy=ring", "bench.strategy=ring"], "is given twice"),
        (["bench.strategy=dense", "bench.worlds=2"], "runs on one rank, not 2"),
        (["bench.strategy=star block_size=8 anchor_size=9"], "anchor_size=9"),
        (["bench.lengths=40,4"], "bench.lengths=4: allowed: above bench.question_tokens=4"),
        (["bench.lengths=40,many"], "bench.lengths=40,many: allowed: numbers of tokens above 0"),
        (["bench.lengths=9K"], "bench.lengths=9216: ring: document=9212 tokens"),
        (["bench.worlds=0"], "bench.worlds=0: allowed"),
        (["bench.batches="], "bench.batches=: allowed"),
        (["bench.new_tokens=1"], "bench.new_tokens=1: allowed: 2 or more"),
        (["bench.tolerance=-1"], "bench.tolerance=-1"),
        (["bench.peers="], ": allowed: auto, all, none"),
        (["bench.worlds=2", "launch.nproc=3"], "3 ranks are asked for elsewhere; drop one"),
        (["transport=threads", "launch.nproc=3"], "transport=threads simulates its ranks"),
        (["bench.batches=1,2", "kernel.unified_max=true"], "only one prompt at a time has it"),
        (["bench.peers=hf-sdpa,vllm"], "vllm: allowed: auto, all, none, or of hf-eager"),
        (["bench.peers=llama.cpp"], "llama.cpp: needs a"),
        (["bench.worlds=1", f"bench.peers={PEER}"], "needs several processes"),
        (["document.text=a"], "prompts are made by bench.lengths"),
        (["profile.path=a"], "recording takes time"),
    ],
)
def test_what_cannot_be_measured_is_refused(bare, change, says):
    with pytest.raises(UserError) as error:
        plan_of(bare, *change)
    assert says in str(error.value)


def test_prompts_are_the_same_for_everyone_and_end_nothing(bare):
    config, files, _ = plan_of(bare)
    one, other = (prompts_of(config, files, Load(72, 3), call) for call in (0, 1))
    assert one == prompts_of(config, files, Load(72, 3), 0) != other
    assert [len(prompt) for prompt in one] == [72] * 3
    tokens = {token for prompt in one for token in prompt}
    assert not tokens & files.end_tokens() and max(tokens) < files.vocab_size


def test_who_cannot_be_measured_is_named(bare):
    _, _, plan = plan_of(bare, "bench.peers=auto", "bench.worlds=1")
    assert plan.processes[:2] == ["hf-eager", "hf-sdpa"]
    (note,) = [note for note in plan.notes if note.startswith("llama.cpp")]
    assert "is not measured: needs a" in note


# -- what is made of times ---------------------------------------------------------------------

CALLS = [
    Timed(10.0, [[11.0, 11.5, 11.6], [12.0, 12.1, 12.4]], [[1, 2, 3], [4, 5, 6]]),
    Timed(20.0, [[21.5, 21.6, 21.7], [21.5, 21.7, 22.0]], [[7, 8, 9], [1, 1, 1]]),
]


def test_times_are_summed_up_as_in_serving():
    cell = measured(("ring", 2), Load(100, 2), CALLS, 3.5, [10, 20])
    row = row_of(cell, {("hf-sdpa", 1, 100, 2): [1, 2, 4]})
    assert (row["completed"], row["total_input_tokens"], row["total_output_tokens"]) == (4, 400, 12)
    assert row["duration"] == pytest.approx(2.4 + 2.0)
    assert row["request_throughput"] == pytest.approx(4 / 4.4)
    assert row["output_throughput"] == pytest.approx(12 / 4.4)
    assert row["total_token_throughput"] == pytest.approx(412 / 4.4)
    ttft, tpot = [1000, 2000, 1500, 1500], [300, 200, 100, 250]
    itl = [500, 100, 100, 300, 100, 100, 200, 300]
    for name, times in (("ttft", ttft), ("tpot", tpot), ("itl", itl)):
        assert row[f"mean_{name}_ms"] == pytest.approx(np.mean(times))
        assert row[f"median_{name}_ms"] == pytest.approx(np.median(times))
        assert row[f"p99_{name}_ms"] == pytest.approx(np.percentile(times, 99))
    assert row["same_tokens"] == pytest.approx(2 / 3)
    assert row["median_prompts_ms"] == pytest.approx((2000 + 1500) / 2)
    text = block(row)
    assert "ring, 2 ranks, 100 tokens, batch 2" in text.splitlines()[0]
    for line in ("Successful requests:", "Mean TTFT (ms):", "P99 TPOT (ms):", "Median ITL (ms):"):
        assert line in text


def test_floors_are_products_and_bytes_at_the_highest_rates():
    work = {
        "token_flops": 10,
        "head_flops": 100,
        "weight_bytes": 55,
        "layers": [
            {"window": None, "pair_flops": 2, "kv_bytes": 3},
            {"window": 4, "pair_flops": 1, "kv_bytes": 1},
        ],
    }
    work = ModelWork.from_dict(work)
    found = highest([Ceilings(1e3, 7.0, 4, work), Ceilings(5e2, 1e2, 4, work)])
    assert found == Ceilings(1e3, 1e2, 4, work)
    # 10 tokens: 55 pairs, and within the window 1 + 2 + 3 + 7 · 4
    assert found.ttft_s(10) == pytest.approx((10 * 10 + 100 + 2 * 55 + 34) / 1e3)
    assert found.tpot_s(10, 2) == pytest.approx((55 + 2 * (30 + 4)) / 1e2)
    assert found.tpot_s(10, 2, 4) == pytest.approx((55 + 2 * (30 + 4) / 4) / 1e2)
    cell = measured(("ring", 8), Load(10, 2), CALLS, 0.0, [1])
    row = row_of(cell, {}, Floor(found))
    assert row["floor_ttft_ms"] == pytest.approx(1e3 * 2 * found.ttft_s(10) / 4)
    assert row["floor_tpot_ms"] == pytest.approx(1e3 * found.tpot_s(11, 2, 4))
    other = measured(("llama.cpp", 1), Load(10, 2), CALLS, 0.0, [1])
    assert "floor_tpot_ms" not in row_of(other, {}, Floor(found))  # its bytes are others
    small = row_of(cell, {}, Floor(found, small_kv=True, simulated=True))
    assert small["floor_ttft_ms"] == pytest.approx(1e3 * 2 * found.ttft_s(10))
    assert "floor_tpot_ms" not in small
    assert highest([]) is None


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_work_is_that_of_the_weights_that_a_token_meets(family):
    files = find_model(ModelConfig(path=tiny_folder(family)))
    config = files.config
    bound = files.load(ModelConfig(), torch.float32, torch.device("cpu"))
    work = work_of(bound)
    head = 2 * config.hidden_size * config.vocab_size
    assert work.head_flops == head
    layers = bound.model.get_decoder().layers
    weights = sum(p.numel() for p in layers.parameters() if p.dim() > 1)
    if family == "mixtral":  # all experts are there, and a token meets some
        experts = sum(p.numel() for name, p in layers.named_parameters() if "experts" in name)
        unused = 1 - config.num_experts_per_tok / config.num_local_experts
        weights -= round(experts * unused)
    assert work.token_flops == 2 * weights
    assert work.weight_bytes == 4 * (weights + head // 2)
    dim = config.head_dim or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, config.num_key_value_heads
    pair, kv = (
        sum(getattr(each, name) for each in work.layers) for name in ("pair_flops", "kv_bytes")
    )
    assert pair == config.num_hidden_layers * 4 * heads[0] * dim
    assert kv == config.num_hidden_layers * 2 * heads[1] * dim * 4


def test_lines_are_read_while_they_are_written(tmp_path):
    path, seen = tmp_path / "cells.jsonl", []
    first = measured(("ring", 2), Load(100, 2), CALLS, 3.5, [10, 20], "gloo", "torch")
    work = ModelWork(1, 2, 3, [LayerWork(None, 4, 5)])
    second, third = AttentionTimes("ringattn", 2, 100, [0.1, 0.2]), Ceilings(1.0, 2.0, 1, work)
    with LineReader(path, seen.append, every_s=0.01) as reader:
        add_line(str(path), first)
        ends = time.monotonic() + 30
        while not seen and time.monotonic() < ends:
            time.sleep(0.01)
        assert seen == [first]  # before the writer is done
        with path.open("a") as file:
            file.write('{"kind": "Meas')  # a writer that was killed
        add_line(str(path), second)
        add_line(str(path), third)
    assert reader.lines == seen == [first, second, third]


def test_rounds_are_one_cell_with_the_calls_of_all():
    first = measured(("ring", 2), Load(100, 2), CALLS, 3.5, [10, 20], "gloo", "torch")
    second = replace(first, peak_memory_bytes=[30, 5], ids=[9, 9], cpu_s=1.0)
    failed = Measured(*first.key, why_not="no room")
    joined = all_rounds([first, failed, Measured("other", 1, 100, 2, "never"), second])
    assert joined.keys() == {first.key, ("other", 1, 100, 2)}
    both = joined[first.key]
    assert both.ttft_s == 2 * first.ttft_s and both.token_s == 2 * first.token_s
    assert (both.cpu_s, both.duration_s) == (4.5, 2 * first.duration_s)
    assert (both.peak_memory_bytes, both.ids, both.why_not) == ([30, 20], first.ids, None)
    assert joined["other", 1, 100, 2].why_not == "never"
    alone = [AttentionTimes("ringattn", 2, 100, [0.1]), AttentionTimes("ringattn", 2, 40, [0.2])]
    again = AttentionTimes("ringattn", 2, 100, [0.3])
    assert [each.seconds for each in all_attention([*alone, again])] == [[0.1, 0.3], [0.2]]


# -- comparisons -------------------------------------------------------------------------------


def result(device: str, **times: float) -> dict:
    cells = [
        {"contender": who.replace("_", "-"), "world": 1, "length": 9, "batch": 1, "why_not": None}
        | {"median_ttft_ms": ms, "median_tpot_ms": ms / 2, "transport": None}
        for who, ms in times.items()
    ]
    told = {"dtype": "float32", "new_tokens": 4, "question_tokens": 4}
    return {"model": "m", "device": device, "cells": cells, **told}


def apart(found: dict) -> dict:
    """With the peers' cells at another length."""
    for cell in found["cells"]:
        cell["length"] += 32 * (cell["contender"] == "hf-sdpa")
    return found


def test_times_on_a_cpu_are_compared_as_multiples_of_a_peer():
    then, now = result("cpu", ring=10, hf_sdpa=10), result("cpu", ring=33, hf_sdpa=30, star=1)
    found, how = changes(now, then)
    assert [(c.contender, c.what) for c in found] == [("ring", "TTFT"), ("ring", "TPOT")]
    assert [c.times for c in found] == pytest.approx([1.1, 1.1])
    assert "multiples" in how
    assert changes(now, result("cpu", ring=10))[0] == []  # nobody to compare with


def test_times_on_the_same_gpu_are_compared_as_they_are():
    then, now = result("H200", ring=10, hf_sdpa=10), result("H200", ring=33, hf_sdpa=30)
    assert [c.times for c in changes(now, then)[0]] == pytest.approx([3.3, 3.3])
    other = changes(now, result("A100", ring=10, hf_sdpa=10))[0]
    assert [c.times for c in other] == pytest.approx([1.1, 1.1])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "is no result of launch.bench"),
        ('{"answer": 1}', "is no result of launch.bench"),
        (result("cpu"), "was measured with m, and this is with tiny"),
        (result("cpu") | {"dtype": "bfloat16"}, "was measured with bfloat16"),
        (result("cpu") | {"new_tokens": 9}, "was measured with 9, and this is with 4"),
        (result("H200"), "was measured on H200, and this is another kind"),
        (result("cpu", hf_sdpa=1), "has none of these cells"),
        (result("cpu", ring=1), "on a CPU both need a peer"),
        (apart(result("cpu", ring=1, hf_sdpa=1)), "on a CPU both need a peer"),
    ],
)
def test_what_cannot_be_compared_with_is_refused(bare, tmp_path, content, says):
    path, name = tmp_path / "then, 1.json", Path(bare).name
    if isinstance(content, dict):  # of this model and these loads, but for what is wrong
        content = {**content, "model": "m" if "with m," in says else name}
        content["cells"] = [{**cell, "length": cell["length"] + 31} for cell in content["cells"]]
        says = says.replace("tiny", name)
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    _, files, plan = plan_of(bare, f"bench.against={path}", "bench.worlds=1")
    with pytest.raises(UserError, match=says):
        read_earlier(plan, files)


def test_what_only_one_of_two_runs_has_is_not_compared():
    then, now = result("H200", ring=10), result("H200", ring=33)
    then["cells"][0] |= {"transport": "threads", "world": 2}
    now["cells"][0]["world"] = 2
    assert changes(now, then)[0] == []


# -- whole runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory, bare):
    """One run of everything, with its output."""
    path = tmp_path_factory.mktemp("a b") / "bench, 1.json"
    grid = ["bench.worlds=1,2", "bench.batches=1,2", f"bench.peers=hf-sdpa,{PEER}"]
    done = python("-m", "launch.bench", f"model.path={bare}", *SMALL, *grid, f"output.path={path}")
    assert done.returncode == 0, done.stderr
    return path, done.stdout, done.stderr


@pytest.mark.slow
def test_everyone_is_measured_in_one_run(bench, bare):
    path, out, err = bench
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads(path.read_text())
    keys = {(c["contender"], c["world"], c["length"], c["batch"]) for c in found["cells"]}
    who = [("ring", 1), ("star 1/4", 1), ("ring", 2), ("star 1/4", 2), ("hf-sdpa", 1)]
    assert keys == {
        (*each, length, batch) for each in who for length in (40, 72) for batch in (1, 2)
    }
    for cell in found["cells"]:
        assert cell["why_not"] is None
        assert cell["completed"] == 2 * cell["batch"]
        assert cell["total_output_tokens"] == 4 * cell["completed"]
        assert cell["median_ttft_ms"] > 0 and cell["median_tpot_ms"] > 0
        assert len(cell["peak_memory_bytes"]) == cell["world"]
        if cell["contender"] == "ring":
            assert cell["same_tokens"] == 1
            assert (cell["transport"], cell["kernel"]) == ("gloo", "torch")
    attention = {(a["contender"], a["world"], a["length"]) for a in found["attention"]}
    both = [("ringattn", 2), (PEER, 2), ("PyTorch sdpa", 1)]
    assert attention == {(*each, length) for each in both for length in (40, 72)}
    assert all(each["median_ms"] > 0 for each in found["attention"])
    assert found["ceilings"]["flops_per_s"] > 0
    assert out.count("Successful requests:") == len(keys)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".config.yaml").exists()
    assert "20 cells" in err


@pytest.fixture
def in_this_process(monkeypatch):
    """Those who are measured are not started: one process, or simulated ranks, is enough."""

    def start(module, arguments, nproc):
        assert nproc == 1
        return import_module(module).COMMAND.main(arguments)

    monkeypatch.setattr("launch.bench.__main__.start_ranks", start)


@pytest.mark.slow
def test_what_became_slower_ends_with_1(bench, bare, tmp_path, in_this_process, capsys):
    path, *_ = bench
    earlier = json.loads(path.read_text())
    before = tmp_path / "before, 1.json"
    one = ["bench.worlds=1", "bench.strategy=ring", "bench.peers=hf-sdpa", "bench.tolerance=1000"]
    given = [f"model.path={bare}", *SMALL, *one, "--against", str(before)]
    for factors, status in (((1, 1), 0), ((1e-6, 1), 1), ((1e6, 1e-6), 1)):
        for cell in earlier["cells"]:
            if cell["contender"] == "ring":
                cell["median_tpot_ms"] *= factors[0]
                cell["median_ttft_ms"] *= factors[1]
        before.write_text(json.dumps(earlier))
        assert main(given) == status
        out, err = capsys.readouterr()
        assert len(json.loads(out.splitlines()[-1])["against"]) == 4
        assert (" slower" in out) == ("2 times are longer" in err) == bool(status)


@pytest.mark.slow
def test_what_has_no_times_any_more_ends_with_1(bare, tmp_path, in_this_process, capsys):
    before = tmp_path / "before.json"
    given = [f"model.path={bare}", *SMALL, "bench.worlds=1", "bench.peers=hf-sdpa"]
    given += ["bench.strategy=ring", "bench.tolerance=1000"]
    assert main([*given, f"output.path={before}"]) == 0
    less = [f"cache.max_bytes={56 * TOKEN}", "cache.page_tokens=4", "--against", str(before)]
    capsys.readouterr()
    assert main([*given, *less]) == 1
    out, err = capsys.readouterr()
    assert "1 cells had times before, and have none now: first ring, 1 ranks, 72 tokens" in err
    assert json.loads(out.splitlines()[-1])["cells"]
    told = json.loads(before.read_text())
    told["cells"][0]["median_ttft_ms"] = 0
    before.write_text(json.dumps(told))
    assert main([*given, "--against", str(before)]) == 2
    assert "is no result of launch.bench" in capsys.readouterr().err


@pytest.mark.slow
def test_a_benchmark_that_ends_early_keeps_what_is_done(
    bare, tmp_path, monkeypatch, in_this_process, capsys
):
    start, started, path = bench_main.start_ranks, [], tmp_path / "b.json"
    said, last = INTERRUPTED, 3

    def interrupted(module, arguments, nproc):
        started.append(module)
        return said if len(started) == last else start(module, arguments, nproc)

    monkeypatch.setattr(bench_main, "start_ranks", interrupted)
    given = [f"model.path={bare}", *SMALL, "bench.worlds=1", "bench.peers=hf-sdpa"]
    assert main([*given, "bench.strategy=ring", f"output.path={path}"]) == INTERRUPTED
    cells = json.loads(path.read_text())["cells"]
    found = {(cell["contender"], cell["why_not"]) for cell in cells}
    assert found == {("ring", None), ("hf-sdpa", NOT_DONE)}
    monkeypatch.setenv("HOME", str(tmp_path))
    path.write_text("of before")
    for status in (INTERRUPTED, FAULT, USER):
        started.clear()
        said, last = status, 3 if status == INTERRUPTED else 4
        assert main([*given, "bench.strategy=ring", "output.path=~/b.json"]) == status
        assert path.read_text() == "of before"
        assert "~/b.json is left as it was" in capsys.readouterr().err


@pytest.mark.slow
def test_simulated_ranks(bare, in_this_process, capsys):
    given = [f"model.path={bare}", *SMALL, "transport=threads", "bench.worlds=3"]
    assert main([*given, "bench.peers=none", "bench.rounds=2"]) == 0
    out, err = capsys.readouterr()
    cells = json.loads(out.splitlines()[-1])["cells"]
    assert {(cell["world"], cell["completed"]) for cell in cells} == {(3, 2 * 2)}
    assert out.count("Successful requests:") == 2 * len(cells)
    assert f"{len(cells)} cells, 2 rounds of them" in err


def test_attention_alone_that_was_not_measured_is_said_to_be(bare, monkeypatch, capsys):
    monkeypatch.setattr("launch.bench.__main__.start_ranks", lambda *_: 0)
    given = [f"model.path={bare}", *SMALL, "bench.worlds=2", f"bench.peers={PEER}"]
    assert main(given) == 1  # ours is missing
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])["attention"]
    assert {(each["contender"], each["why_not"]) for each in alone} == {
        ("ringattn", NOT_DONE),
        (PEER, NOT_DONE),
    }


@pytest.mark.parametrize(
    ("tokens", "world", "says"),
    [
        (10_000, 2, None),
        (10_006, 2, "each rank's share, 5003, is buckets of 256 to 4096 tokens"),
        (20_000, 4, None),
        (66, 2, None),
        (9, 2, "that 2 ranks divide evenly"),
    ],
)
def test_a_peer_is_not_asked_to_cut_a_share_into_crumbs(tokens, world, says):
    why = why_not(tokens, world)
    assert why is None if says is None else says in why


@pytest.mark.slow
def test_what_finds_no_room_is_a_cell_that_says_so(bare, in_this_process, capsys):
    """With batches too; those that have room are measured."""
    given = [f"model.path={bare}", *SMALL, "transport=threads", "bench.worlds=1"]
    given += ["bench.peers=none", "bench.strategy=ring", "bench.batches=1,2"]
    room = 56 * TOKEN
    more = [f"cache.max_bytes={room}", "cache.page_tokens=4", "cache.offload=disk"]
    assert main([*given, *more, "cache.offload_path=/tmp"]) == 0
    cells = json.loads(capsys.readouterr().out.splitlines()[-1])["cells"]
    found = {(cell["length"], cell["batch"]): cell["why_not"] for cell in cells}
    assert found[40, 1] is None
    assert all("cache.max_bytes" in found[key] for key in ((72, 1), (40, 2), (72, 2)))


@pytest.mark.slow
def test_ranks_of_torchrun(bare):
    given = [f"model.path={bare}", *SMALL, "bench.rounds=2"]
    done = python(*TORCHRUN, "2", "-m", "launch.bench", *given)
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout.splitlines()[-1])["cells"]
    assert {(cell["world"], cell["completed"]) for cell in cells} == {(2, 2 * 2)}
    assert done.stderr.count("hf-sdpa is not measured: has processes of its own") == 1


def test_a_peer_that_dies_ends_no_benchmark(bare, monkeypatch, capsys):
    """What it did not do is said; a fault of ours is the benchmark's, and a mistake ends it."""
    for failing, its, status in (("ranks", 2, 2), ("peer", 1, 0), ("peer", 2, 0), ("ranks", 1, 1)):
        monkeypatch.setattr(
            "launch.bench.__main__.start_ranks",
            lambda module, *_, f=f"launch.bench.{failing}", s=its: s * (module == f),
        )
        given = [f"model.path={bare}", *SMALL, "bench.worlds=1", "bench.peers=hf-sdpa"]
        assert main(given) == status
        out = capsys.readouterr().out
        if status == USER:  # the others would be measured beside nothing
            assert out == ""
            continue
        assert {cell["why_not"] for cell in json.loads(out.splitlines()[-1])["cells"]} == {NOT_DONE}


@pytest.mark.slow
def test_a_batch_of_a_model_that_has_no_sdpa_attention(in_this_process, capsys):
    given = [f"model.path={tiny_folder('gemma2')}", *SMALL, "bench.worlds=1", "bench.peers=none"]
    assert main([*given, "bench.strategy=ring", "bench.batches=2"]) == 0
    cells = json.loads(capsys.readouterr().out.splitlines()[-1])["cells"]
    assert [cell["why_not"] for cell in cells] == [None] * len(cells)


@pytest.mark.slow
def test_rope_that_depends_on_the_length(in_this_process, capsys):
    """What is encoded is as long as what is asked about it."""
    folder = tiny_folder("llama", **DYNAMIC)
    given = [f"model.path={folder}", "bench.lengths=90", "bench.requests=1", "bench.new_tokens=3"]
    given += ["bench.worlds=1", "bench.strategy=ring", "model.allow_beyond_limit=true"]
    assert main([*given, "bench.peers=hf-sdpa"]) == 0
    ring, _ = json.loads(capsys.readouterr().out.splitlines()[-1])["cells"]
    assert ring["why_not"] is None and ring["same_tokens"] > 0


def test_wrong_input_ends_with_2_before_anything_starts(bare, capsys, monkeypatch):
    monkeypatch.setattr("launch.bench.__main__.start_ranks", lambda *_: pytest.fail("started"))
    given = [f"model.path={bare}", *SMALL]
    assert main([*given, "bench.strategy=rung"]) == 2
    assert main([*given, "--against=none/there.json"]) == 2
    assert main([*given, "output.path=none/there.json"]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 3


def test_a_cell_that_was_not_measured_says_why(bare):
    row = row_of(Measured("hf-eager", 1, 40, 1, "needs 9 TiB"))
    assert "not measured: needs 9 TiB" in block(row)
    text = tables({"cells": [row], "attention": [], "contenders": {"hf-eager": "a"}})
    assert "not measured: hf-eager, 40 tokens, batch 1: needs 9 TiB" in text
