"""python -m pytest tests/launch/test_evaluate.py

A tiny random model through whole runs: what is written, what is taken up, what is refused.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import launch.evaluate
import launch.start
from launch.evaluate import picture_paths
from launch.evaluate_log import Scored, samples_path
from launch.evaluate_picture import draw
from launch.evaluate_plan import Plan, make_plan, read_lengths, read_tasks
from launch.evaluate_result import CANNOT, results
from launch.evaluate_star import contenders
from launch.evaluate_tables import tables
from launch.faults import Fault
from launch.lines import LineLog
from launch.options import EVALUATE
from ringstar.config import DenseConfig, RingConfig
from ringstar.errors import UserError
from ringstar.evaluation import RULER, TASKS, paired_p, retention, wilson
from ringstar.models import ModelFiles, find_model
from tests.support.chat import TEMPLATE, chat_folder
from tests.support.commands import THREADS, environment, json_lines
from tests.support.models import LONGROPE, tiny_folder

pytest.importorskip("wonderwords")
pytest.importorskip("scipy")

ROOT = Path(__file__).parent.parent.parent
COMMAND = launch.evaluate
PAGE = ROOT / "docs/evaluate.md"
GIVEN = [
    "evaluate.tasks=qa_1,needle_by_depth",
    "evaluate.lengths=800",
    "evaluate.samples=2",
    "evaluate.depths=2",
    "evaluate.depth_samples=1",
    "evaluate.star=block_size=quarter",
    "evaluate.star=block_size=200 anchor_size=0",
]
LABELS = ["exact", "star 1/4", "star 200, no anchor"]


def model() -> str:
    return f"model.path={chat_folder()}"


def scored(path: Path) -> list[Scored]:
    return [Scored(**line) for line in json_lines(samples_path(str(path)))]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """The result of one run; the others beside it."""
    path = tmp_path_factory.mktemp("evaluate") / "e.json"
    assert COMMAND.main([model(), *THREADS, *GIVEN, f"output.path={path}"]) == 0
    return path


# -- a whole run -------------------------------------------------------------------------------


def test_what_is_written(path):
    names = ["e.config.yaml", "e.depths.png", "e.json", "e.png", "e.samples.jsonl"]
    assert sorted(file.name for file in path.parent.iterdir()) == names
    for name in ("e.png", "e.depths.png"):
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG")


def test_every_sample_is_there_for_every_setting(path):
    lines = scored(path)
    want = {("qa_1", 800, None, i, s) for i in (0, 1) for s in LABELS}
    want |= {("needle_by_depth", 800, depth, 0, s) for depth in (0.0, 1.0) for s in LABELS}
    assert len(lines) == len(want)
    assert {line.key for line in lines} == want
    assert [line.index for line in lines] == sorted(line.index for line in lines)


def test_samples_are_the_same_for_every_setting_and_fit(path):
    digests: dict = {}
    for line in scored(path):
        digests.setdefault(line.key[:4], set()).add((line.digest, *line.references))
        new = TASKS[line.task].new_tokens
        assert line.tokens == line.document_tokens + line.query_tokens + new
        assert 0.99 * line.length <= line.tokens <= line.length
        assert 0 < line.answer_tokens <= new or line.finish_reason == "stop"
        assert (line.world_size, line.transport, line.seed) == (2, "threads", 0)
        assert line.encode_s > 0 and line.kv_bytes > 0
    assert all(len(seen) == 1 for seen in digests.values())
    assert len({next(iter(seen))[0] for seen in digests.values()}) == len(digests)


def test_every_field_is_described(path):
    """Of a sample and of the result; `sources` has what was used."""
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    described = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    result = json.loads(path.read_text())
    fields = set(scored(path)[0].__dataclass_fields__)
    for key, value in result.items():
        fields.add(key)
        if isinstance(value, list):
            fields |= {f"{key}.{name}" for name in value[0]}
    fields |= {"sources.NAME.source", "sources.NAME.sha256"}
    described -= {name for name in described if name in TASKS}
    assert described == fields


def test_the_result_is_that_of_the_samples(path):
    result, lines = json.loads(path.read_text()), scored(path)
    assert (len(result["cells"]), result["model"]) == (3 * 3, Path(chat_folder()).name)
    for cell in result["cells"]:
        own = [x for x in lines if all(cell[k] == getattr(x, k) for k in ("task", "length"))]
        own = [x for x in own if (x.depth, x.strategy) == (cell["depth"], cell["strategy"])]
        assert cell["samples"] == len(own) == (2 if cell["depth"] is None else 1)
        assert cell["mean"] == sum(line.score for line in own) / len(own)
        assert [cell["low"], cell["high"]] == pytest.approx(wilson(cell["mean"], len(own)))
    assert {(m["length"], m["strategy"], m["tasks"]) for m in result["means"]} == {
        (800, s, 1) for s in LABELS
    }
    assert set(result["sources"]) == {"essay", "questions", "words"}


# -- going on ----------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on(path, tmp_path, run, monkeypatch):
    """What is there stays to the byte, half a line is dropped, and the scores are the same."""
    again = tmp_path / "a.json"
    lines = samples_path(str(path)).read_text().splitlines(keepends=True)
    kept = "".join(lines[:8])
    samples_path(str(again)).write_text(kept + lines[8][:40])
    (tmp_path / "a.config.yaml").write_text(path.with_suffix(".config.yaml").read_text())
    given = [model(), *GIVEN, f"output.path={again}"]
    _, err = run(*given)  # and on one rank
    assert f"{len(lines)} samples over 3 settings, 8 of them done" in err
    assert samples_path(str(again)).read_text().startswith(kept)
    before, after = scored(path), scored(again)
    assert [(x.key, x.score, x.answer) for x in before] == [
        (x.key, x.score, x.answer) for x in after
    ]

    def load(*_, **__):
        raise AssertionError("nothing was left to do")

    monkeypatch.setattr(ModelFiles, "load", load)
    out, _ = run(*given)  # tables again, without the model
    assert "qa_1" in out and "depth 100%" in out


def test_more_samples_lengths_tasks_and_settings_are_added(path, tmp_path, run):
    more = tmp_path / "m.json"
    for name in (".samples.jsonl", ".config.yaml"):
        more.with_suffix(name).write_text(path.with_suffix(name).read_text())
    given = ["evaluate.tasks=qa_1", "evaluate.lengths=800,900", "evaluate.samples=3"]
    stars = ["evaluate.star=block_size=quarter", "evaluate.star=block_size=1/2"]
    run(model(), *THREADS, *given, *stars, f"output.path={more}")
    added = scored(more)[len(scored(path)) :]
    assert len(added) == 3 * 3 * 2 - 2 * 2  # what was there for exact and quarters
    cells = json.loads(more.read_text())["cells"]
    assert {c["strategy"] for c in cells} == {"exact", "star 1/4", "star 1/2"}
    assert all(c["samples"] == 3 for c in cells)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["evaluate.seed=1"], "another evaluate.seed"),
        (["model.dtype=bfloat16"], "another model.dtype"),
        (["cache.dtype=int8"], "another cache.dtype"),
        (["evaluate.qa_path=QA"], "other samples of qa_1"),
    ],
)
def test_samples_of_another_run_are_not_taken_for_this(path, tmp_path, run, change, says):
    qa = tmp_path / "qa.jsonl"
    rows = [
        {
            "question": f"{n}?",
            "answers": ["yes"],
            "paragraphs": [f"{n}: yes.", f"{n} {n}: yes."][:k],
        }
        for n, k in enumerate([1, 2, 1, 2])
    ]
    qa.write_text("\n".join(map(json.dumps, rows)))
    change = [text.replace("QA", str(qa)) for text in change]
    before = samples_path(str(path)).read_bytes()
    _, err = run(model(), *THREADS, *GIVEN, *change, f"output.path={path}", status=2)
    assert says in err and len(err.splitlines()) == 1
    assert samples_path(str(path)).read_bytes() == before


def test_weights_that_changed_are_noticed_and_how_they_are_computed_is_not(path, tmp_path, run):
    """Where the model is says nothing about its weights; a memory option nothing about scores."""
    more, folder = tmp_path / "m.json", tmp_path / "model"
    shutil.copytree(chat_folder(), folder)
    given = [f"model.path={folder}", *THREADS, "evaluate.tasks=qa_1", "evaluate.lengths=800"]
    given += ["evaluate.star=block_size=quarter", f"output.path={more}"]
    run(*given, "evaluate.samples=1")
    run(*given, "evaluate.samples=2", "model.ff_slice_tokens=64")
    before = samples_path(str(more)).read_bytes()
    shutil.copytree(chat_folder(initializer_range=0.1), folder, dirs_exist_ok=True)
    _, err = run(*given, "evaluate.samples=3", status=2)
    assert "has samples of a model of another fingerprint" in err
    assert samples_path(str(more)).read_bytes() == before


def test_a_sample_that_does_not_fit_is_left_out(tmp_path, run, monkeypatch):
    made = Plan.sample

    def sample(plan, cell, number):
        if number == 1:
            raise UserError("evaluate.lengths", cell.length, "qa_1 needs some 801 tokens")
        return made(plan, cell, number)

    monkeypatch.setattr(Plan, "sample", sample)
    path = tmp_path / "e.json"
    given = [model(), *THREADS, "evaluate.tasks=qa_1", "evaluate.lengths=800", "evaluate.samples=3"]
    _, err = run(*given, "evaluate.star=block_size=quarter", f"output.path={path}")
    assert "qa_1 800: sample 1 is left out: evaluate.lengths=800: qa_1 needs some 801" in err
    run(*given, "evaluate.star=block_size=quarter", f"output.path={path}")  # again
    assert {line.index for line in scored(path)} == {0, 2}
    assert {cell["samples"] for cell in json.loads(path.read_text())["cells"]} == {2}


def test_texts_that_changed_behind_the_first_sample_are_noticed(tmp_path, run):
    """Another answer to a question changes no prompt; a later page not that of sample 0."""
    qa, path = tmp_path / "qa.jsonl", tmp_path / "e.json"
    rows = [{"question": f"{n}?", "answers": ["yes"], "paragraphs": [f"{n}: yes."]} for n in "12"]
    qa.write_text("\n".join(map(json.dumps, rows)))
    given = [model(), *THREADS, "evaluate.tasks=qa_1,vt", "evaluate.lengths=1200"]
    given += ["evaluate.samples=1", f"evaluate.qa_path={qa}", f"output.path={path}"]
    run(*given)
    digest = hashlib.sha256(qa.read_bytes()).hexdigest()
    texts = {(line.task, line.text_sha256) for line in scored(path)}
    assert texts == {("qa_1", digest), ("vt", None)}
    run(*given)  # nothing is left
    qa.write_text(qa.read_text().replace('"yes"', '"no"'))
    _, err = run(*given, status=2)
    assert "other samples of qa_1" in err


def test_another_chat_template_is_noticed_and_another_day_is_not(tmp_path, run):
    """A template may print the date, be it in a macro."""
    folder, path = tmp_path / "model", tmp_path / "e.json"
    shutil.copytree(chat_folder(), folder)
    config = folder / "tokenizer_config.json"
    dated = "{% macro day() %}{{ strftime_now('%d %B %Y, %f') }}{% endmacro %}<user>{{ day() }}"
    template = folder / "chat_template.jinja"
    assert template.exists() and "chat_template" not in config.read_text()
    template.write_text(dated + TEMPLATE)
    given = [f"model.path={folder}", *THREADS, "evaluate.tasks=vt", "evaluate.lengths=1200"]
    given += ["evaluate.star=none", f"output.path={path}"]
    run(*given, "evaluate.samples=1")
    run(*given, "evaluate.samples=2")  # microseconds have passed
    assert len({line.template for line in scored(path)}) == 1
    template.write_text(dated + TEMPLATE.replace("<bot>", "<bot><bot>"))
    _, err = run(*given, "evaluate.samples=3", status=2)
    assert "has samples with another chat template" in err


def test_exact_alone(tmp_path, run):
    """Of a model whose window star would not see past."""
    path, folder = tmp_path / "e.json", chat_folder("mistral", sliding_window=64)
    given = [f"model.path={folder}", *THREADS, "evaluate.lengths=1200"]
    given += ["evaluate.tasks=vt,niah_multikey_3"]
    _, err = run(*given, status=2)
    assert "hides part of" in err and "evaluate.star=none evaluates exact alone" in err
    out, _ = run(*given, "evaluate.samples=1", "evaluate.star=none", f"output.path={path}")
    assert {line.strategy for line in scored(path)} == {"exact"}
    assert "p: paired" not in out and "Wilson" in out
    assert json.loads(path.read_text())["strategies"] == [{"label": "exact", "given": ""}]
    _, err = run(*given, "evaluate.star=none", "evaluate.star=block_size=1/4", status=2)
    assert err.startswith("ringstar: evaluate.star=none: ")


def test_a_share_that_does_not_fit_one_document_leaves_it_out(tmp_path, run):
    """An anchor of a half is longer than its block for one document, and not for another."""
    path = tmp_path / "e.json"
    given = [model(), *THREADS, "evaluate.tasks=niah_multikey_3", "evaluate.lengths=1200"]
    given += [f"output.path={path}"]
    run(*given, "evaluate.samples=12", "evaluate.star=none")
    tokens = [line.document_tokens for line in scored(path)]
    size = -(-tokens[0] // 2)
    fits = [number for number, count in enumerate(tokens) if -(-count // 2) <= size]
    assert 0 < len(fits) < len(tokens)
    star = f"evaluate.star=block_size={size} anchor_size=1/2"
    _, err = run(*given, "evaluate.samples=12", star)
    assert err.count("is left out") == len(tokens) - len(fits)
    assert [line.index for line in scored(path) if line.strategy != "exact"] == fits


def test_a_sample_whose_answer_would_cross_longrope_s_jump_is_left_out(tmp_path, run):
    """One that reads a little less than the cell's first does."""
    given = [*THREADS, "evaluate.tasks=niah_single_1", "evaluate.lengths=1900"]
    given += ["evaluate.samples=5", "evaluate.star=none"]
    plain, path = tmp_path / "plain.json", tmp_path / "e.json"
    run(model(), *given, f"output.path={plain}")
    read = [line.document_tokens + line.query_tokens for line in scored(plain)]
    after = read[0] - 1
    rope = {**LONGROPE["rope_parameters"], "original_max_position_embeddings": after}
    changes = {**LONGROPE, "original_max_position_embeddings": after, "rope_parameters": rope}
    folder = chat_folder.__wrapped__("phi3", **changes, hidden_size=64)
    _, err = run(f"model.path={folder}", *given, f"output.path={path}")
    fits = [number for number, count in enumerate(read) if count > after]
    assert 0 < len(fits) < len(read)
    assert err.count("(longrope) changes") == len(read) - len(fits)
    assert [line.index for line in scored(path)] == fits


def test_one_run_at_a_time(path, tmp_path, run, monkeypatch):
    """Another run has the file, or had it since it was read."""
    for suffix in (".samples.jsonl", ".config.yaml"):
        shutil.copy(path.with_suffix(suffix), tmp_path / f"o{suffix}")
    samples, given = tmp_path / "o.samples.jsonl", [model(), *THREADS, *GIVEN]
    before = samples.read_bytes()
    log = LineLog(samples, before.count(b"\n"))
    _, err = run(*given, f"output.path={tmp_path}/o.json", status=2)
    assert "o.samples.jsonl: another run is adding to it" in err
    log.close()
    with pytest.raises(UserError, match="has just added to it"):
        LineLog(samples, 3)
    assert samples.read_bytes() == before
    run(*given, f"output.path={tmp_path}/o.json")


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
    log = LineLog(tmp_path / "x.jsonl")
    log.add({"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Fault, match=r"x\.jsonl: cannot be written: no space left"):
        log.add({"b": 2})


@pytest.mark.parametrize("line", ["{}\n", "[]\n", "nothing\n", '{"task": "vt"}\n'])
def test_another_file_is_not_taken_for_samples(tmp_path, run, line):
    (tmp_path / "r.samples.jsonl").write_text(line)
    _, err = run(model(), *GIVEN, f"output.path={tmp_path}/r.json", status=2)
    assert "r.samples.jsonl:1: is no sample of an evaluation" in err


@pytest.mark.slow
def test_a_killed_run_of_real_ranks_goes_on(tmp_path, run):
    """Killed after a few samples; another number of ranks does the rest."""
    path = tmp_path / "k.json"
    given = [model(), "evaluate.tasks=qa_*", "evaluate.lengths=1200", f"output.path={path}"]
    command = [sys.executable, "-m", "launch.evaluate", "launch.nproc=2", *given]
    killed = subprocess.Popen(
        [*command, "transport.threads_per_rank=1", "evaluate.samples=400"],
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    file, deadline = samples_path(str(path)), time.monotonic() + 120
    while (not file.exists() or file.read_bytes().count(b"\n") < 8) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = file.read_text().rpartition("\n")[0].splitlines()
    assert len(before) >= 8 and not path.exists()
    samples = len(before) // 6 + 1
    run(*given, f"evaluate.samples={samples}")
    after = file.read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == samples * 2 * 3
    assert len({line.key for line in scored(path)}) == len(after)
    assert {line.world_size for line in scored(path)} == {1, 2}


# -- what the figures say ------------------------------------------------------------------------


def line(task: str, number: int, strategy: str, score: float, depth=None) -> Scored:
    blank = {"str": "", "int": 0, "float": 0.0, "list[str]": []}
    fields = {f.name: blank.get(str(f.type)) for f in Scored.__dataclass_fields__.values()}
    scored = Scored(**fields)  # type: ignore[arg-type]
    key = {"task": task, "length": 1500, "depth": depth, "index": number, "strategy": strategy}
    return replace(scored, **key, score=score)


SCORES = {
    ("vt", "exact"): [0.2, 1.0, 0.6, 0.8],
    ("vt", "star 1/4"): [0.2, 0.4, 0.6, 0.6],
    ("qa_1", "exact"): [0.0] * 4,
    ("qa_1", "star 1/4"): [1.0, 0.0, 0.0, 0.0],
}


@pytest.fixture(scope="module")
def plan():
    texts = ["evaluate.tasks=vt,qa_1", "evaluate.lengths=1500", "evaluate.samples=4"]
    config = EVALUATE.parse([model(), *texts, "evaluate.star=block_size=1/4"])
    return make_plan(config, find_model(config.model))


@pytest.fixture(scope="module")
def found(plan):
    lines = [
        line(task, number, label, score)
        for (task, label), scores in SCORES.items()
        for number, score in enumerate(scores)
    ]
    beyond = [line("vt", 4, "exact", 0.0), line("cwe", 0, "exact", 0.0)]  # of another run
    return results(plan, [*lines, *beyond])


def test_star_is_held_against_exact_on_the_same_samples(found):
    exact, star, *_ = found
    assert (exact.task, exact.mean, exact.samples, exact.retention) == ("vt", 0.65, 4, None)
    assert star.mean == pytest.approx(0.45)
    want = retention(SCORES["vt", "star 1/4"], SCORES["vt", "exact"])
    assert (star.retention, star.retention_low, star.retention_high) == want
    assert star.p == paired_p(SCORES["vt", "star 1/4"], SCORES["vt", "exact"]) == 0.5
    assert (star.worse, star.better) == (2, 0)
    assert star.can


def test_what_exact_cannot_do_is_said(plan, found):
    _, _, exact, star = found
    assert exact.mean < CANNOT and not exact.can and not star.can
    assert star.retention is None and star.better == 1
    text = " ".join(tables(plan, found).split())
    assert "the model cannot do the task, and what star keeps of it cannot be told: qa_1" in text
    assert "exact near 0" in text
    assert re.search(r"vt │ 65 \(\d+-\d+\) │ 45 \(\d+-\d+\) │ 69 \(\d+-\d+\) │ 0.5", text)
    assert "mean of 2" in text and "32.5" in text
    assert "questions: invented people and towns" in text
    assert draw(plan, found, "title").startswith(b"\x89PNG")


# -- what may be given ---------------------------------------------------------------------------


def test_settings_of_star():
    given = [
        "block_size=quarter",
        "block_size=1K anchor_size=1/16",
        "block_size=1/8 anchor_size=0",
        "block_size=64 anchor_content=shuffled anchor_seed=4",
    ]
    found, _ = contenders(given, 1)
    assert [star.label for star in found] == [
        "exact",
        "star 1/4",
        "star 1K, anchor 1/16",
        "star 1/8, no anchor",
        "star 64, content shuffled, seed 4",
    ]
    sizes = [(s.block_size, s.anchor_size) for s in (star.strategy(4001) for star in found[1:])]
    assert sizes == [("1001", None), ("1K", "251"), ("501", "0"), ("64", None)]
    assert isinstance(found[0].strategy(9), DenseConfig)
    assert isinstance(contenders([], 3)[0][0].strategy(9), RingConfig)
    assert [star.label for star in contenders([], 1)[0]] == ["exact", "star 1/4", "star 1/8"]


def test_lengths_and_tasks():
    assert read_lengths("a", "4K, 1K 1024,7K") == [1024, 4096, 7168]
    assert [task.name for task in read_tasks("vt niah_multi*,vt")] == [
        *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
        *("niah_multivalue", "niah_multiquery", "vt"),
    ]
    assert {task.name for task in read_tasks("*")} == {*RULER, "needle_by_depth"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["evaluate.tasks=niah_single_1,nix"], "evaluate.tasks=niah_single_1,nix: nix: no such"),
        (["evaluate.tasks="], "evaluate.tasks=: allowed: niah_single_1,"),
        (["evaluate.lengths=1K,x"], "evaluate.lengths=1K,x: allowed: numbers of tokens above 0"),
        (["evaluate.lengths=0"], "evaluate.lengths=0: allowed"),
        (["evaluate.lengths=300"], "evaluate.lengths=300: niah_single_1 needs some"),
        (["evaluate.lengths=1M"], "evaluate.lengths=1048576"),
        (["evaluate.lengths=8K"], "model.allow_beyond_limit"),
        (["evaluate.samples=0"], "evaluate.samples=0: allowed: an integer above 0"),
        (["evaluate.depths=-1"], "evaluate.depths=-1: allowed: an integer above 0"),
        (["evaluate.star=block_size=x"], "evaluate.star=block_size=x: block_size=x: allowed"),
        (["evaluate.star=block_size=5/4"], "evaluate.star=block_size=5/4: block_size=5/4: allowed"),
        (["evaluate.star=block_size=0/4"], "a share up to 1, as 1/4"),
        (["evaluate.star=anchor_size=4"], "block_size is needed"),
        (["evaluate.star=block_size=null"], "block_size is needed"),
        (["evaluate.star=block_size=1/4 size=3"], "size=3: allowed: FIELD=VALUE"),
        (["evaluate.star=block_size=1/8 anchor_size=1/4"], "at 1200 tokens: anchor_size="),
        (
            ["evaluate.star=block_size=1/4", "evaluate.star=block_size=quarter"],
            "evaluate.star=block_size=quarter: is the same as block_size=1/4",
        ),
        (
            ["evaluate.star=block_size=1K", "evaluate.star=block_size=1024"],
            "evaluate.star=block_size=1024: is the same as block_size=1K",
        ),
        (["evaluate.star=block_size=1/8", "evaluate.star=block_size=2/16"], "is the same as"),
        (["evaluate.essay_path=/nowhere", "evaluate.tasks=niah_single_2"], "cannot be read"),
        (["evaluate.essay_path=-", "evaluate.tasks=niah_single_2"], "the name of a text file"),
        (["evaluate.essay_path=~nobody/x", "evaluate.tasks=niah_single_2"], "cannot be read"),
        ([f"evaluate.qa_path={'x' * 300}", "evaluate.tasks=qa_1"], "cannot be read: file name"),
        (["evaluate.qa_path=QA", "evaluate.tasks=qa_1"], "line 1: needed"),
        (["evaluate.qa_path=CUT", "evaluate.tasks=qa_1"], "line 2: is not JSON (Expecting"),
        (["evaluate.qa_path=ONE", "evaluate.tasks=qa_2"], "no question of this kind (qa_2)"),
        (["evaluate.picture=x.gif"], "evaluate.picture=x.gif: allowed: a name that ends in .png"),
        (["output.path=/nowhere/x.json"], "output.path=/nowhere/x.json"),
        (["question=Who?"], "question=Who?: tasks make documents and questions"),
        (["document.path=x"], "document.path=x: tasks make documents"),
        (["generation.temperature=1"], "generation.temperature=1: tasks make"),
        (["strategy=star"], "strategy=star: exact is ring, or dense on one rank"),
        (["evaluate.size=3"], "evaluate.size=3: unknown option"),
    ],
)
def test_wrong_input_is_one_line(change, says, run, untouched, tmp_path):
    qa, one = tmp_path / "qa.jsonl", tmp_path / "one.jsonl"
    qa.write_text('{"question": "Who?"}\n')
    one.write_text('{"question": "Who?", "answers": ["I"], "paragraphs": ["It was I."]}\n' * 2)
    cut = tmp_path / "cut.jsonl"
    cut.write_text(one.read_text().rstrip().removesuffix("}"))
    for name, file in {"=QA": qa, "=ONE": one, "=CUT": cut}.items():
        change = [text.replace(name, f"={file}") for text in change]
    base = ["evaluate.tasks=niah_single_1", "evaluate.lengths=1200"]
    keys = {text.partition("=")[0] for text in change}
    kept = [text for text in base if text.partition("=")[0] not in keys]
    _, err = run(model(), *kept, *change, status=2)
    (said,) = [row for row in err.splitlines() if not row.startswith("ringstar: exact side")]
    assert says in said


def test_a_model_without_a_tokenizer_is_refused(run):
    _, err = run(f"model.path={tiny_folder('llama')}", status=2)
    assert "has no tokenizer, and tasks are texts" in err


@pytest.mark.parametrize("name", ["wonderwords", "scipy"])
def test_a_missing_package_is_one_line(name, run, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    given = ["evaluate.tasks=niah_single_1", "evaluate.lengths=1200", "evaluate.samples=1"]
    _, err = run(model(), *given, status=2)
    assert "pip install 'ringstar[evaluate]'" in err.splitlines()[-1]
    assert err.splitlines()[0] == err.splitlines()[-1]  # before anything else


def test_help_teaches(capsys):
    assert COMMAND.main(["--help"]) == 0
    out, _ = capsys.readouterr()
    assert "needle_by_depth" in out and "evaluate.star" in out
    families = {re.sub(r"_\d$", "", name) for name in TASKS}
    assert all(name in out for name in families - {"qa"})


def test_pictures_need_a_place(tmp_path):
    config = EVALUATE.parse([model(), f"output.path={tmp_path}/x.json"])
    assert picture_paths(config) == (tmp_path / "x.png", tmp_path / "x.depths.png")
    assert picture_paths(EVALUATE.parse([model()])) is None
    config = EVALUATE.parse([model(), f"evaluate.picture={tmp_path}/y.png"])
    assert picture_paths(config) == (tmp_path / "y.png", tmp_path / "y.depths.png")
