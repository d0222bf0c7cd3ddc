"""python -m pytest tests/benchmarks/test_growth.py

The growth of cost: its plans, its fits, its report, and what was committed of it.
"""

import json
from copy import deepcopy

import pytest

from benchmarks import growth
from benchmarks.growth import measure_rank, save_model, sweeps
from benchmarks.growth_plan import BLOCK, COSTS, DIM, HEADS, LAYERS, Job, planned
from benchmarks.growth_report import draw, exponent, fits, shown, table, to_the_byte
from benchmarks.run import RESULTS
from tests.support.ranks import in_processes

PAIR = 4 * HEADS * DIM
JOBS = [Job(work, strategy, 2 * BLOCK, 2) for work in growth.SHARE for strategy in ("ring", "star")]


def committed():
    (path,) = RESULTS.glob("*-cpu-growth.json")
    return json.loads(path.read_text())["growth"]


def test_a_ring_computes_every_causal_pair_and_sends_its_share_on():
    tokens, world = 1000, 4
    plan = planned(Job("attention", "ring", tokens, world))
    assert plan.flops == PAIR * tokens * (tokens + 1) // 2
    assert plan.sent == [(world - 1) * tokens // world * COSTS.kv_bytes] * world
    assert plan.kv == [tokens // world * COSTS.kv_bytes] * world


def test_star_computes_its_blocks_and_their_anchors_and_sends_one_anchor():
    blocks = 4
    plan = planned(Job("model", "star", blocks * BLOCK, 2))
    pairs = blocks * BLOCK * (BLOCK + 1) // 2 + (blocks - 1) * BLOCK * BLOCK
    weights = planned(Job("model", "ring", blocks * BLOCK, 2)).flops
    weights -= LAYERS * PAIR * blocks * BLOCK * (blocks * BLOCK + 1) // 2
    assert plan.flops == LAYERS * PAIR * pairs + weights
    assert plan.sent == [LAYERS * BLOCK * COSTS.kv_bytes, 0]


def test_runs_send_and_keep_what_is_planned_to_the_byte(tmp_path):
    """In processes: what lives in others is not counted."""
    save_model(str(tmp_path))
    ranks = in_processes(2, measure_rank, JOBS, str(tmp_path))
    for number, job in enumerate(JOBS):
        plan, seen = planned(job), [rank[number] for rank in ranks]
        assert [rank["sent_bytes"] for rank in seen] == plan.sent
        assert [rank["kv_bytes"] for rank in seen] == plan.kv
        for rank in seen:
            assert abs(rank["peak_bytes"] - rank["planned_peak_bytes"]) < 1024
            assert len(rank["cpu_s"]) == growth.REPEATS


def test_sweeps_change_one_thing_at_a_time():
    for name, jobs in sweeps().items():
        shares = {job.tokens // job.world for job in jobs}
        worlds = {job.world for job in jobs}
        assert len(jobs) == 4
        assert len(worlds if name.startswith("length") else shares) == 1
        assert len(shares if name.startswith("length") else worlds) == 4


def test_exponents_are_those_of_powers():
    assert exponent([1, 2, 4, 8], [3.0 * n**1.7 for n in (1, 2, 4, 8)]) == pytest.approx(1.7)
    assert exponent([1, 2, 4], [5, 5, 5]) == pytest.approx(0)
    assert exponent([1, 2], [0, 1]) is None


def test_a_cost_that_grows_too_fast_and_a_byte_too_many_are_seen():
    part = committed()
    assert to_the_byte(part)
    wrong = deepcopy(part)
    points = wrong["sweeps"]["length, attention, ring"]
    points[-1]["cpu_s"] *= 3
    points[0]["sent_bytes"][1] += 1
    assert not to_the_byte(wrong)
    rows = {(row["sweep"], row["quantity"]): row["within"] for row in fits(wrong)}
    assert not rows["length, attention, ring", "cpu"]
    assert "NOT every one" in table(wrong)


def test_the_report_and_the_picture_are_those_of_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    (report,) = RESULTS.glob("*-cpu-growth.md")
    assert table(committed()).strip() in report.read_text()
    draw(committed(), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert report.with_suffix(".png").stat().st_size < 150_000


def test_costs_grow_as_planned():
    """Bytes within 5%, what is sent to the byte; CPU time within 10%."""
    for row in fits(committed()):
        assert row["within"], row
    for points in committed()["sweeps"].values():
        for point in points:
            assert abs(point["peak_bytes"] - point["planned_peak_bytes"]) < 1024


def test_the_readme_has_the_exponents_of_the_file():
    text = (RESULTS.parent.parent / "README.md").read_text()
    section = text.partition("### How cost grows")[2].partition("\n## ")[0]
    rows = {(row["sweep"], row["quantity"]): row["fitted"] for row in fits(committed())}
    for quantity in ("cpu", "peak", "sent"):
        found = [
            shown(rows[f"{grows}, model, {strategy}", quantity], 2)
            for grows in ("length", "ranks")
            for strategy in ("ring", "star")
        ]
        assert f"| {' | '.join(found)} |" in section
