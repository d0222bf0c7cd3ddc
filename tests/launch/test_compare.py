"""python -m pytest tests/launch/test_compare.py

Exact against star: what is written is whole and consistent, what cannot be is refused by name.
"""

import functools
import json
import math
import os
import pty
import re
import sys
import termios
import weakref
from pathlib import Path

import pytest
import torch
import yaml

import launch.compare
import launch.pictures
from launch.compare_facts import MOST, make_facts
from launch.compare_measure import Measurement, forced, quoted_share
from launch.compare_needles import even_depths, is_found, plant
from launch.compare_plan import make_plan
from launch.compare_star import default_settings, parse_star, star_label
from launch.options import COMPARE
from ringstar.answers import Answer
from ringstar.config import MAX_NEEDLES, ModelConfig, StarConfig
from ringstar.errors import UserError
from ringstar.metrics import RankMetrics
from ringstar.models import find_model
from ringstar.runtime import LongContext
from tests.support.chat import LIMIT, LINES, chat_folder
from tests.support.commands import THREADS, python
from tests.support.models import DYNAMIC, LONGROPE, tiny_folder

COMMAND = launch.compare
SMALL = [*THREADS, "generation.max_new_tokens=6", "compare.probes=3", "compare.probe_tokens=9"]
QUESTIONS = ["question=Who [left] the harbour?", "question=What's the ship's name?"]
SETTINGS = [
    "compare.star=block_size=1M",  # one block: exact
    "compare.star=block_size=40 anchor_size=0",
    "compare.star=block_size=96 anchor_size=33 anchor_content=shuffled anchor_seed=4",
]
PAGE = Path(__file__).parent.parent.parent / "docs/compare.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One run with all that there is."""
    folder = tmp_path_factory.mktemp("compare")
    book = folder / "book.txt"
    book.write_text("\n".join(LINES * 6))
    path = folder / "result.json"
    given = [f"model.path={chat_folder()}", f"document.path={book}", f"output.path={path}"]
    assert COMMAND.main([*given, *QUESTIONS, *SETTINGS, *SMALL, "compare.needle_trials=2"]) == 0
    return folder


@pytest.fixture(scope="module")
def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


# -- a whole run -----------------------------------------------------------------------------


def paths(value, before="") -> set[str]:
    """Dotted names of all fields; those of `strategy` are the strategies' own."""
    if isinstance(value, list):
        return set().union(*(paths(item, before) for item in value))
    if not isinstance(value, dict):
        return set()
    found = {before + key for key in value}
    inner = {key: item for key, item in value.items() if key != "strategy"}
    return found.union(*(paths(item, f"{before}{key}.") for key, item in inner.items()))


def test_every_field_is_described(result):
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    described = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert sorted(described) == sorted(paths(result))


def test_what_was_asked_is_all_there(result):
    assert [question["text"] for question in result["questions"]] == [
        question.partition("=")[2] for question in QUESTIONS
    ]
    assert (result["world_size"], result["transport"], result["encodes"]) == (2, "threads", 12)
    labels = [setting["summary"]["label"] for setting in result["settings"]]
    assert labels == [
        "exact (ring)",
        "star, one block",
        "star 40, no anchor",
        "star 96, anchor 33, content shuffled, seed 4",
    ]
    assert [s["given"] for s in result["settings"][1:]] == [s.partition("=")[2] for s in SETTINGS]
    tokens = result["document_tokens"]
    for setting, size in zip(result["settings"][1:], (tokens, 40, 96), strict=True):
        assert setting["block_size"] == size
        assert setting["blocks"] == -(-tokens // size)


def test_figures_belong_together(result):
    exact, *stars = result["settings"]
    for setting in result["settings"]:
        summary = setting["summary"]
        assert summary["encode_s"] > 0
        ratio = summary["encode_s"] / exact["summary"]["encode_s"]
        assert summary["encode_ratio"] == pytest.approx(ratio)
        assert summary["kv_bytes"] == max(setting["kv_bytes"]) > 0
        assert summary["bytes_sent"] == max(setting["bytes_sent"])
        assert len(setting["kv_bytes"]) == len(setting["bytes_sent"]) == 2
        assert sum(setting["kv_bytes"]) == sum(exact["kv_bytes"])  # the same document's
        found = [n["found"] for trial in setting["trials"] for n in trial["needles"]]
        assert (len(found), sum(found)) == (10, summary["needles_found"])
        assert 0 <= summary["quoted"] <= 1
    for star in stars:
        check_divergences(star, exact, result)


def check_divergences(star, exact, result) -> None:
    summary = star["summary"]
    positions = []
    for answer, its in zip(star["answers"], exact["answers"], strict=True):
        ended = its["finish_reason"] == "stop"
        assert len(answer["kl"]) == len(answer["same_top"]) == len(its["answer_ids"]) + ended
        assert answer["same_as_exact"] == (answer["answer_ids"] == its["answer_ids"])
        positions += zip(answer["kl"], answer["same_top"], strict=True)
    assert summary["answer_kl_mean"] == pytest.approx(mean(kl for kl, _ in positions))
    assert summary["answer_same_top"] == pytest.approx(mean(same for _, same in positions))
    first = [answer["kl"][0] for answer in star["answers"]]
    assert summary["first_kl_mean"] == pytest.approx(mean(first))
    assert summary["first_kl_max"] == max(first)
    assert summary["same_answers"] == sum(answer["same_as_exact"] for answer in star["answers"])
    sizes = [passage["tokens"] for passage in result["passages"]]
    assert [len(passage["kl"]) for passage in star["passages"]] == sizes == [9, 9, 9]
    every = [kl for passage in star["passages"] for kl in passage["kl"]]
    assert summary["passage_kl_mean"] == pytest.approx(mean(every))


def mean(values) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def test_exact_is_held_against_nothing(result):
    exact = result["settings"][0]
    assert (exact["given"], exact["blocks"], exact["strategy"]["name"]) == (None, None, "ring")
    assert all(answer["same_as_exact"] and answer["kl"] is None for answer in exact["answers"])
    assert all(passage["same_top"] is None for passage in exact["passages"])
    assert exact["summary"]["answer_kl_mean"] is exact["summary"]["same_answers"] is None


def test_one_block_is_exact(result):
    one = result["settings"][1]
    summary = one["summary"]
    assert summary["same_answers"] == 2
    assert summary["answer_same_top"] == summary["passage_same_top"] == 1
    assert summary["first_kl_max"] < 1e-9
    assert max(kl for passage in one["passages"] for kl in passage["kl"]) < 1e-9


def test_blocks_that_see_nothing_else_are_not(result):
    summary = result["settings"][2]["summary"]
    assert summary["answer_kl_mean"] > 1e-4
    assert summary["passage_kl_mean"] > 1e-4
    assert summary["bytes_sent"] == 0


def test_kl_is_that_of_the_logits(result, folder):
    """Worked out again, from a runtime of its own, without the command's functions."""
    text = (folder / "book.txt").read_text()
    one = LongContext.from_pretrained(chat_folder(), strategy="dense", threads_per_rank=1)
    two = LongContext.from_pretrained(
        chat_folder(),
        strategy=StarConfig(block_size=40, anchor_size=0),
        transport="threads",
        world_size=2,
        threads_per_rank=1,
    )
    answer = result["settings"][0]["answers"][0]
    ids = one.files.query_ids(result["questions"][0]["text"]) + answer["answer_ids"][:-1]
    last = len(answer["answer_ids"])
    logits = (runtime.logits(runtime.encode(text), ids, last) for runtime in (one, two))
    p, q = (rows.double().softmax(-1) for rows in logits)
    want = (p * (p.log() - q.log())).sum(-1)
    got = result["settings"][2]["answers"][0]["kl"][:last]
    assert torch.allclose(torch.tensor(got).double(), want, rtol=1e-3, atol=1e-9)
    assert p.argmax(-1).tolist() == answer["answer_ids"]  # greedy


def test_what_is_written(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "book.txt",
        "result.config.yaml",
        "result.json",
        "result.png",
    ]
    picture = (folder / "result.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert 10_000 < len(picture) < 1_000_000
    config = yaml.safe_load((folder / "result.config.yaml").read_text())
    assert config["compare"]["star"] == [text.partition("=")[2] for text in SETTINGS]
    assert config["question"] == [text.partition("=")[2] for text in QUESTIONS]
    assert config["strategy"]["name"] == "ring"


# -- ways to run it ----------------------------------------------------------------------------


def test_one_rank_without_settings_and_files(run, chat, book):
    out, err = run(
        f"model.path={chat}",
        f"document.path={book}",
        "question=Who [b]left[/b]?",
        "generation.max_new_tokens=3",
        "compare.needles=0",
        "compare.probes=2",
    )
    assert "exact side: dense, because there is one rank" in err
    tokens = int(re.search(r"document's ([\d,]+) tokens", err)[1])
    assert f'"block_size={-(-tokens // 4)}", "block_size={-(-tokens // 8)}"' in err
    assert "4 encodes, 4 settings" in err
    assert "exact (dense)" in out
    assert "Who [b]left[/b]?" in out  # nothing of it is markup
    assert "needles found, by depth" not in out
    assert out.count("of exact's time") == 4  # in the table, and a sentence for each setting
    assert all(len(line) <= 140 for line in out.splitlines())


def test_token_ids_without_a_tokenizer(run, tmp_path, bare, ids_file):
    given = [f"model.path={bare}", f"document.ids_path={ids_file(list(range(90)), [1, 2])}"]
    path = tmp_path / "r.json"
    out, err = run(*given, *SMALL, "compare.star=block_size=20", f"output.path={path}")
    assert "ringstar: no needles: the model has no tokenizer" in err.splitlines()
    assert "2 token ids" in out
    result = json.loads(path.read_text())
    exact, star = result["settings"]
    assert result["haystacks"] == exact["trials"] == []
    assert exact["summary"]["needles_found"] is None
    assert result["questions"] == [{"text": None, "query_tokens": 2}]
    assert len(star["answers"][0]["kl"]) == 6


@pytest.mark.parametrize("length", [1, 2, 5])
def test_documents_of_a_few_tokens(run, bare, ids_file, length):
    given = [f"model.path={bare}", f"document.ids_path={ids_file([5] * length, [1, 2])}"]
    out, _ = run(*given, *SMALL)
    assert "star" in out


def test_one_document_at_a_time(run, monkeypatch, chat, book):
    """The exact one and those of star are never held together."""
    held: list[weakref.ref] = []
    most = []
    encode = LongContext.encode

    def counted(self, *arguments, **settings):
        most.append(sum(ref() is not None for ref in held))
        document = encode(self, *arguments, **settings)
        held.append(weakref.ref(document))
        return document

    monkeypatch.setattr(LongContext, "encode", counted)
    run(f"model.path={chat}", f"document.path={book}", QUESTIONS[0], *SMALL)
    assert most == [0] * 9  # a warm-up, and four settings on two documents


def test_one_bar_on_a_terminal_only(run, monkeypatch, chat, book):
    given = [f"model.path={chat}", f"document.path={book}", QUESTIONS[0], *SMALL]
    assert "left" not in run(*given)[1]
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with open(terminal, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        run(*given)
        stderr.flush()
        shown = os.read(controller, 1 << 16).decode(errors="replace")  # may end within a letter
    os.close(controller)
    assert "compare:   0%" in shown
    assert "left" in shown
    lines = [line.rpartition("\r")[2] for line in shown.split("\r\n")]
    assert "ringstar: strategy ring, layout zigzag" in lines  # above the bar, not in it


@pytest.mark.slow
def test_real_ranks_find_what_simulated_ones_do(run, tmp_path, chat, book):
    """They read the document through a pipe."""
    threads, gloo = tmp_path / "threads.json", tmp_path / "gloo.json"
    shared = [f"model.path={chat}", "compare.needles=2", *SETTINGS, QUESTIONS[0]]
    shared += [option for option in SMALL if option not in THREADS]
    run(*shared, *THREADS, f"document.path={book}", f"output.path={threads}")
    how = ["launch.nproc=2", "transport.threads_per_rank=1", "document.path=-"]
    with Path(book).open() as text:
        done = python("-m", "launch.compare", *shared, *how, f"output.path={gloo}", stdin=text)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("ringstar: ") for line in done.stderr.splitlines())
    assert "answers side by side" in done.stdout
    assert all(path.with_suffix(".png").is_file() for path in (threads, gloo))
    found = [json.loads(path.read_text())["settings"] for path in (threads, gloo)]
    for one, other in zip(*found, strict=True):
        assert one["answers"][0]["answer_ids"] == other["answers"][0]["answer_ids"]
        assert one["bytes_sent"] == other["bytes_sent"]
        if one["answers"][0]["kl"]:
            pairs = zip(one["passages"], other["passages"], strict=True)
            assert all(a["kl"] == pytest.approx(b["kl"], rel=1e-2, abs=1e-9) for a, b in pairs)
        assert one["trials"][0]["needles"] == other["trials"][0]["needles"]


def test_help_says_what_it_is(run):
    out, err = run("--help")
    for part in ("compare.star=", "KL", "top-1", "encodes", "needles"):
        assert part in out
    assert "strategy" not in out
    assert err == ""


def test_rope_by_length_is_that_of_the_longest_read(run, tmp_path):
    """Of 81 positions and more; where questions differ in it, nothing is encoded."""
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps({"context_ids": [5, 6, 7] * 25, "query_ids": [9] * 7}))
    given = [f"document.ids_path={ids}", *SMALL, "compare.star=block_size=30"]
    run(f"model.path={tiny_folder('phi3', **LONGROPE)}", *given)
    for family, changes in (("phi3", LONGROPE), ("llama", DYNAMIC)):
        folder = tiny_folder(family, **changes)
        fewer = [each.replace("probe_tokens=9", "probe_tokens=4") for each in given]
        more = [f"model.path={folder}", "model.allow_beyond_limit=true"]
        _, err = run(*more, *fewer, status=2)
        assert "document: this model's rotary embedding depends on the length" in err


# -- what is refused, before weights are read ----------------------------------------------------


WRONG = [
    ("compare.star=blok_size=3", ["blok_size=3: allowed: FIELD=VALUE of block_size, anchor_size"]),
    ("compare.star=block_size", ["block_size: allowed: FIELD=VALUE"]),
    ("compare.star=", ["compare.star", "is empty"]),
    ("compare.star=name=ring", ["name=ring: allowed: FIELD=VALUE"]),
    ("compare.star=block_size=4 block_size=5", ["block_size is given twice"]),
    ("compare.star=block_size=0", ["block_size=0: allowed: a number of tokens above 0"]),
    ("compare.star=block_size=4KB", ["block_size=4KB", "as 4096 or 4K"]),
    ("compare.star=anchor_size=-1", ["anchor_size=-1", "or 0 for no anchor"]),
    ("compare.star=anchor_size=9M", ["anchor_size=9437184: is more than"]),
    ("compare.star=block_size=64 anchor_size=65", ["anchor_size=65", "at most block_size=64"]),
    ("compare.star=anchor_content=last", ["anchor_content=last", "first, previous, shuffled"]),
    ("compare.star=anchor_positions=next", ["anchor_positions=next", "own, previous, random"]),
    ("compare.star=share_anchor=all", ["share_anchor=all", "auto, world, rank, none"]),
    ("compare.star=anchor_seed=x", ["anchor_seed=x: allowed: an integer"]),
    ("compare.star=anchor_seed=null", ["anchor_seed=null: allowed: an integer"]),
    ("compare.star=anchor_token=3", ["anchor_token=3", "with anchor_content=constant"]),
    (
        "compare.star=anchor_content=constant anchor_token=999999",
        ["anchor_token=999999", "token ids must be from 0"],
    ),
    (
        "compare.star=anchor_content=previous share_anchor=world",
        ["share_anchor=world", "anchor_content=previous gives each block its own"],
    ),
    ("compare.needles=-1", ["compare.needles=-1", "from 0 (none) to 60"]),
    ("compare.needles=61", ["compare.needles=61", "from 0 (none) to 60"]),
    ("compare.needle_trials=0", ["compare.needle_trials=0", "above 0"]),
    ("compare.probes=-1", ["compare.probes=-1", "0 (none) or more"]),
    ("compare.probe_tokens=0", ["compare.probe_tokens=0", "above 0"]),
    ("compare.picture=a.jpg", ["compare.picture=a.jpg", "ends in .png"]),
    ("compare.picture=/none/a.png", ["compare.picture=/none/a.png", "cannot be written"]),
    ("compare.stars=block_size=4", ["did you mean compare.star?"]),
    ("strategy=star", ["strategy=star", "compare.star="]),
    ("strategy.layout=zigzag", ["strategy.layout=zigzag", "the exact side is ring"]),
    ("generation.temperature=1", ["generation.temperature=1", "greedy"]),
    ("output.first_logits=x", ["output.first_logits=x", "drop it"]),
    ("compare.probe_tokens=100000", ["compare", "4 GiB"]),
]


@pytest.mark.parametrize(("argument", "parts"), WRONG)
def test_wrong_options(refused, chat, book, argument, parts):
    more = ["compare.probes=100000"] if "100000" in argument else []
    given = [f"model.path={chat}", f"document.path={book}", QUESTIONS[0], "launch.nproc=2"]
    line = refused(*given, argument, *more)
    if argument.startswith("compare.star="):
        assert line.startswith("compare.star")
    for part in parts:
        assert part in line, line


def test_settings_that_are_the_same(refused, chat, book):
    given = [f"model.path={chat}", f"document.path={book}", QUESTIONS[0]]
    line = refused(*given, "compare.star=block_size=1K", "compare.star=block_size=2K")
    assert "compare.star=block_size=2K: is the same as block_size=1K" in line


def test_no_question(refused, chat, book, bare, ids_file):
    line = refused(f"model.path={chat}", f"document.path={book}")
    assert "question: at least one is needed" in line
    line = refused(f"model.path={chat}", f"document.path={book}", "question= ")
    assert "is empty" in line
    path = ids_file([1] * 50, [1, 2])
    line = refused(f"model.path={bare}", f"document.ids_path={path}", "question=a")
    assert "question: document.ids_path has query_ids already" in line


def test_needles_that_were_asked_for_need_a_tokenizer(refused, bare, ids_file):
    given = [f"model.path={bare}", f"document.ids_path={ids_file([1] * 50, [1, 2])}"]
    line = refused(*given, "compare.needles=2")
    assert "compare.needles=2: cannot be asked about: the model has no tokenizer" in line


def test_documents_beyond_the_models_limit(refused, chat, tmp_path):
    book = tmp_path / "long.txt"
    book.write_text("a" * 8000)
    given = [f"model.path={chat}", f"document.path={book}", "question=a"]
    assert str(LIMIT) in refused(*given)
    files = find_model(ModelConfig(path=chat))
    room = LIMIT - len(files.query_ids("a")) - 20
    book.write_text("".join(chr(97 + n % 26) for n in range(5 * LIMIT)))
    ids = files.context_ids(book.read_text())[:room]
    book.write_text(files.decode(ids))
    given.append("generation.max_new_tokens=1")
    line = refused(*given, "compare.probe_tokens=400", "compare.needles=0")
    assert "compare.probes=8: with them, document=" in line
    assert "0 is none" in line


def test_settings_with_sliding_windows(refused, ids_file):
    folder = tiny_folder("mistral", sliding_window=100)
    given = [f"model.path={folder}", f"document.ids_path={ids_file([5] * 97)}"]
    line = refused(*given, "compare.star=block_size=50", "compare.probes=0")
    assert line.startswith("compare.star=block_size=50: ")
    assert "sliding window of 100" in line


def test_pictures_without_matplotlib(refused, run, monkeypatch, tmp_path, chat, book):
    monkeypatch.setattr(launch.pictures, "can_draw", lambda: False)
    given = [f"model.path={chat}", f"document.path={book}", QUESTIONS[0]]
    line = refused(*given, f"compare.picture={tmp_path}/a.png")
    assert "pip install 'ringstar[plots]'" in line


def test_no_matplotlib_and_no_picture_asked_for(run, monkeypatch, tmp_path, chat, book):
    monkeypatch.setattr(launch.pictures, "can_draw", lambda: False)
    given = [f"model.path={chat}", f"document.path={book}", QUESTIONS[0], "compare.needles=0"]
    _, err = run(*given, *SMALL, f"output.path={tmp_path}/r.json")
    assert "no picture: matplotlib is not installed" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.config.yaml", "r.json"]


def test_picture_in_place_of_the_result(refused, tmp_path, chat, book):
    given = [f"model.path={chat}", f"document.path={book}", QUESTIONS[0]]
    assert "is output.path too" in refused(*given, f"output.path={tmp_path}/r.png")
    assert not list(tmp_path.iterdir())


# -- parts ---------------------------------------------------------------------------------------


def test_settings_as_they_are_written():
    star = parse_star("  block_size=1K\tanchor_size=null anchor_seed=-3 ")
    assert (star.block_size, star.anchor_size, star.anchor_seed) == ("1K", None, -3)
    assert star_label(star, 5000, 4) == "star 1,024, anchor 1,024, seed -3"
    assert star_label(parse_star("anchor_size=0"), 5000, 4) == "star 1,250, no anchor"
    assert star_label(parse_star("share_anchor=none"), 5000, 4).endswith(", share_anchor none")


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 100, 4097])
def test_default_settings_fit_every_document(tokens):
    found = default_settings(tokens, 3)
    assert 1 <= len(found) <= 3
    assert len({setting.label for setting in found}) == len(found)


@pytest.fixture(scope="module")
def tokenizer():
    return find_model(ModelConfig(path=chat_folder())).tokenizer


def planted(tokenizer, text: str, count: int, first: int = 0):
    ids = tokenizer.encode(text)
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    return ids, plant(ids, first, make_facts(0, count, text), encode, decode)


def test_needles_stand_between_sentences_at_their_depths(tokenizer):
    text = " ".join([f"{LINES[0]} And so on." for _ in range(60)])
    ids, haystack = planted(tokenizer, text, 5)
    assert len(haystack.ids) == len(ids)
    assert even_depths(5) == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert [needle.depth for needle in haystack.needles] == even_depths(5)
    whole = tokenizer.decode(haystack.ids)
    for needle in haystack.needles:
        assert abs(needle.at / len(ids) - needle.depth) < 0.06
        assert re.search(rf"\. {re.escape(needle.fact.sentence)}( |$)", whole)
        sentence = tokenizer.encode(f" {needle.fact.sentence}")
        assert haystack.ids[needle.at : needle.at + len(sentence)] == sentence
    rest = whole
    for needle in haystack.needles:
        rest = rest.replace(f" {needle.fact.sentence}", "")
    assert text.startswith(rest)  # nothing else was changed


def test_needles_in_lines_and_in_text_without_any_end(tokenizer):
    _, haystack = planted(tokenizer, "\n".join(["def f(x)", "    pass"] * 100), 4)
    lines = tokenizer.decode(haystack.ids).split("\n")
    assert all(needle.fact.sentence in lines for needle in haystack.needles)
    ids, haystack = planted(tokenizer, "a" * 900, 3)
    assert len(haystack.ids) >= len(ids) // 2
    assert all(n.fact.sentence in tokenizer.decode(haystack.ids) for n in haystack.needles)


@pytest.mark.parametrize("size", [1, 2, 10, 60])
def test_needles_leave_half_of_a_short_document(tokenizer, size):
    text = "x y. " * size
    ids, haystack = planted(tokenizer, text, 6, first=min(3, len(tokenizer.encode(text)) - 1))
    assert len(haystack.needles) == 6
    whole = tokenizer.decode(haystack.ids)
    for needle in haystack.needles:
        whole = whole.replace(needle.fact.sentence, "")
    assert whole.count("y.") >= size // 2
    assert haystack.needles[0].at >= min(3, len(ids) - 1)  # behind what a template puts first


def test_facts_are_new_to_the_document_and_to_each_other():
    assert MOST == MAX_NEEDLES
    everything = make_facts(0, MOST, "")
    assert len({(fact.attribute, fact.owner) for fact in everything}) == MOST
    assert len({(fact.attribute, fact.expected) for fact in everything}) == MOST
    first, second = (make_facts(trial, 5, "") for trial in (0, 1))
    assert first != second
    assert first == make_facts(0, 5, "")
    assert len({fact.attribute for fact in first}) == 5  # alike facts are mixed up
    said = " ".join(fact.sentence.upper() for fact in first)
    assert not set(make_facts(0, 5, said)) & set(first)
    with pytest.raises(UserError, match="already speaks of"):
        make_facts(0, 5, " ".join(fact.sentence for fact in everything))


def test_what_counts_as_found():
    price = next(fact for fact in make_facts(0, MOST, "") if fact.attribute == "price")
    number = price.expected
    assert price.value == f"{number} dollars"
    for answer in (price.sentence, f"${number}.", f"It is {number}"):
        assert is_found(price, answer)
    for answer in ("", f"1{number}", f"{number}0 dollars", "dollars"):
        assert not is_found(price, answer)
    colour = next(fact for fact in make_facts(0, MOST, "") if fact.attribute == "favorite color")
    assert is_found(colour, f"**{colour.value.upper()}**!")


def answer_of(ids, reason) -> Answer:
    metrics = RankMetrics([0], [0], [0])
    return Answer("", ids, 1, reason, 0.0, 0.0, 0.0, [0.0], torch.zeros(3), metrics)


@pytest.mark.parametrize(
    ("ids", "reason", "want"),
    [
        ([7, 8, 9], "length", ([1, 2, 7, 8], 3)),
        ([7, 8, 9], "stop", ([1, 2, 7, 8, 9], 4)),
        ([], "stop", ([1, 2], 1)),
        ([7], "length", ([1, 2], 1)),
    ],
)
def test_answers_are_told_token_by_token(ids, reason, want):
    """As many rows as choices: the end of an answer is one, if it ended by itself."""
    assert forced([1, 2], answer_of(ids, reason)) == want


def test_quoted_share():
    logits = torch.eye(5)[[1, 4, 3, 0]]
    assert quoted_share([0, 1, 2, 3], logits) == pytest.approx(2 / 3)
    assert quoted_share([0], torch.eye(5)[:1]) == 0


def test_passages_are_of_the_users_text(chat, book):
    given = [f"model.path={chat}", f"document.path={book}", QUESTIONS[0]]
    config = COMPARE.parse([*given, *THREADS, "compare.probes=4", "compare.probe_tokens=7"])
    files = find_model(config.model)
    plan = make_plan(config, files)
    assert plan.document[: plan.passages[0].start][:1] == files.context_ids("")
    for passage in plan.passages:
        assert passage.ids == plan.document[passage.start : passage.start + 7]
        assert passage.start >= 1
    gaps = [b.start - a.start for a, b in zip(plan.passages, plan.passages[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1
    assert math.isclose(plan.passages[0].depth, plan.passages[0].start / len(plan.document))


def test_only_rank_0_keeps_logits(chat, book):
    given = [f"model.path={chat}", f"document.path={book}", QUESTIONS[0]]
    config = COMPARE.parse(given)
    plan = make_plan(config, find_model(config.model))

    class Other:
        rank = 1

    measurement = Measurement(Other(), plan, None)  # type: ignore[arg-type]
    measurement._hold(0, torch.zeros(1, 3), [])
    assert measurement._exact_logits == []
