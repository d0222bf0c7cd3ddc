"""python -m pytest tests/benchmarks/test_needles.py

The needle study without a model: its documents, its statistics, its report.
"""

import json
from dataclasses import replace

import pytest

from benchmarks import needles
from benchmarks.needle_report import interval, paired, summary, write_report
from benchmarks.needle_text import NOISE, document_text, fitted_text, make_needles
from benchmarks.needles import CELLS, DEPTHS, MAIN, TRIALS_PER_CELL, Trial, documents, select
from ringstar.config import ModelConfig, StarConfig
from ringstar.models import find_model
from ringstar.strategies import check_document
from tests.support.chat import chat_folder


@pytest.fixture(scope="module")
def files():
    return find_model(ModelConfig(path=chat_folder()))


def test_documents_are_as_long_as_asked_and_always_the_same(files):
    made = [list(documents(1500, 4, files)) for _ in range(2)]
    assert [ids for _, _, ids in made[0]] == [ids for _, _, ids in made[1]]
    longest = max(len(files.context_ids(line)) for line in NOISE)
    for _, hidden, ids in made[0]:
        assert 1500 - longest <= len(ids) <= 1500
        text = files.decode(ids)
        for needle in hidden:
            assert text.count(needle.key) == text.count(needle.value) == 1
            where = text.index(needle.sentence) / len(text)
            assert abs(where - needle.depth) < 0.1


@pytest.mark.parametrize("keys", [1, 4])
def test_every_depth_is_asked_equally_often(files, keys):
    depths = [needle.depth for _, hidden, _ in documents(900, keys, files) for needle in hidden]
    assert len(depths) == TRIALS_PER_CELL
    assert {depths.count(depth) for depth in DEPTHS} == {TRIALS_PER_CELL // len(DEPTHS)}


def test_needles_share_no_word_and_no_value():
    hidden = make_needles("a seed", DEPTHS)
    words = [word for needle in hidden for word in needle.key.split("-")]
    assert len(set(words)) == len(words)
    assert len({needle.value for needle in hidden}) == len(hidden)
    assert make_needles("a seed", DEPTHS) == hidden != make_needles("another", DEPTHS)
    noise = document_text((), 10)
    assert not any(c.isdigit() for c in noise)
    assert not any(word in noise.split() for word in words)


def test_too_short_a_document_is_refused():
    with pytest.raises(ValueError, match="tokens=5 is too short for 10 needles"):
        fitted_text(make_needles("a", DEPTHS), 5, len)


def test_every_method_can_encode_its_documents():
    for (tokens, _), methods in CELLS.items():
        for changes in methods.values():
            strategy = needles.strategy_of(changes, tokens)
            check_document(strategy, tokens, 1, 1000)
    assert isinstance(needles.strategy_of({}, 4096), StarConfig)
    assert select("2048/1/no anchor") == ((2048, 1), {"no anchor": {"anchor_size": 0}})


def test_intervals():
    low, high = interval(8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)  # Wilson, as textbooks print it
    assert interval(0, 40)[0] == 0
    assert interval(40, 40)[1] == 1


def some(method, found, cell=(2048, 1)):
    return [
        Trial(method, *cell, number, DEPTHS[number % 10], "1234567", "1.", hit, 1.0)
        for number, hit in enumerate(found)
    ]


def test_pairs():
    exact, other = some("exact", [1, 1, 1, 1, 1, 0]), some("no anchor", [1, 0, 0, 0, 0, 1])
    found = paired(other, exact)
    assert found == {"pairs": 6, "only_exact": 4, "only_this": 1, "p": pytest.approx(0.375)}
    assert paired(exact, exact)["p"] == 1


def test_a_cell_may_lack_exact_trials_yet():
    row = summary(some("no anchor", [True]))[2048, 1]["no anchor"]
    assert row["against_exact"]["pairs"] == 0


def test_report(tmp_path, capsys):
    trials = some("exact", [True] * 40) + some("first block", [True] * 30 + [False] * 10)
    trials += [replace(trial, method="no anchor", found=False) for trial in trials[:40]]
    trials += [replace(trial, tokens=4096, keys=4) for trial in trials]
    row = summary(trials)[2048, 1]["first block"]
    assert (row["rate"], row["against_exact"]["only_exact"]) == (0.75, 10)
    assert sum(found for found, _ in row["by_depth"].values()) == 30
    write_report(trials, tmp_path)
    (path,) = tmp_path.glob("*-needles.json")
    cells = json.loads(path.read_text())["cells"]
    assert list(cells) == ["2048/1", "4096/4"]
    assert set(cells["2048/1"]) == set(MAIN)
    text = path.with_suffix(".md").read_text()
    assert "| first block | 30/40 | 75% | 60% to 86% | 10 | 0 | 0.002 |" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "no anchor | 0/40" in capsys.readouterr().out
