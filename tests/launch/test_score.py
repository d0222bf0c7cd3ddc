"""python -m pytest tests/launch/test_score.py

Log-probabilities from the command line: of continuations, and of a document with its curve.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

import launch.pictures
import launch.score
from launch.inputs import each_line
from launch.lines import line_of
from launch.score_plan import RESULT_FIELDS
from launch.score_result import _some
from ringstar import LongContext
from tests.support.commands import THREADS, json_lines, python
from tests.support.models import eager

COMMAND = launch.score
LINES = [
    {"continuation": " The ship left.", "id": 7},
    {"continuation": "\n"},
    {"continuation_ids": [5, 6, 7], "tags": ["a", None]},
]


@pytest.fixture(scope="module")
def runtime(chat):
    return LongContext.from_pretrained(chat, transport="threads", world_size=3, threads_per_rank=1)


@pytest.fixture
def lines_file(tmp_path):
    path = tmp_path / "lines, 1.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in LINES))
    return str(path)


def test_a_document_is_scored_by_itself(run, chat, book, tmp_path, runtime):
    path = tmp_path / "score.json"
    out, _ = run(f"model.path={chat}", f"document.path={book}", f"output.path={path}", *THREADS)
    found = json.loads(path.read_text())
    text = Path(book).read_text()
    ids = runtime.files.tokenizer.encode(text)
    with torch.inference_mode():
        logits = eager(chat)(torch.tensor([ids])).logits[0, :-1].double()
    want = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    assert found["token_ids"] == ids[1:]
    assert torch.tensor(found["logprobs"]).sub(want).abs().max() < 1e-4
    assert (found["tokens"], found["scored_tokens"]) == (len(ids), len(ids) - 1)
    assert found["perplexity"] == pytest.approx(math.exp(-float(want.mean())), rel=1e-5)
    bits = -float(want.sum()) / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-5)
    assert (len(found["curve"]), found["curve"][-1]["tokens"]) == (32, len(ids) - 1)
    assert f"perplexity {found['perplexity']:.4f} of {len(ids) - 1:,} tokens" in out
    assert (found["strategy"], found["layout"], found["world_size"]) == ("ring", "zigzag", 2)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    kept = yaml.safe_load(path.with_suffix(".config.yaml").read_text())
    assert kept["score"]["pieces"] == 32


def test_rows_of_the_table_join_pieces(run):
    curve = [{"tokens": 3 * n, "perplexity": math.exp(n)} for n in range(1, 18)]
    rows = _some(curve)
    assert [row["tokens"] for row in rows] == [9, 18, 27, 36, 45, 51]
    assert rows[0]["perplexity"] == pytest.approx(math.exp(2))


def test_star_says_its_blocks(run, chat, book, tmp_path, runtime):
    path = tmp_path / "score.json"
    star = ["strategy=star", "strategy.block_size=100", "strategy.anchor_size=40"]
    run(f"model.path={chat}", f"document.path={book}", f"output.path={path}", *star, *THREADS)
    found = json.loads(path.read_text())
    assert (found["block_size"], found["anchor_size"]) == (100, 40)
    exact = runtime.score_text(Path(book).read_text())
    assert found["logprobs"][:100] == pytest.approx(exact.logprobs[:100].tolist(), abs=1e-4)
    assert abs(found["perplexity"] / exact.perplexity - 1) > 1e-3


def test_continuations_follow_the_document(run, chat, book, tmp_path, lines_file, runtime):
    path = tmp_path / "scores.jsonl"
    given = [f"model.path={chat}", f"document.path={book}", f"score.path={lines_file}", *THREADS]
    more = ['score.continuation= "a, b"', "score.continuation= x=1"]
    out, err = run(*given, *more, f"output.path={path}")
    assert out == "" and f"5 continuations scored, in {path}" in err
    found = json_lines(path)
    lines = [{"continuation": ' "a, b"'}, {"continuation": " x=1"}, *LINES]
    asked = [line.get("continuation") or line["continuation_ids"] for line in lines]
    scores = runtime.score(Path(book).read_text(), asked)
    for line, score, got in zip(lines, scores, found, strict=True):
        assert {key: got[key] for key in line} == line
        assert list(got)[len(line) :] == list(RESULT_FIELDS)
        assert got["token_ids"] == score.ids
        assert got["logprobs"] == pytest.approx(score.logprobs.tolist(), abs=1e-4)
        assert got["logprob"] == pytest.approx(score.logprob, abs=1e-3)
    out, _ = run(*given)
    assert [json.loads(line)["token_ids"] for line in out.splitlines()] == [
        line["token_ids"] for line in found[2:]
    ]


def test_answers_to_a_question_about_a_saved_document(run, chat, book, tmp_path, runtime):
    """The greedy answer is what its own score calls greedy."""
    document = runtime.encode(Path(book).read_text())
    answer = runtime.ask(document, "Who left?", max_new_tokens=5)
    saved = tmp_path / "book.kv"
    runtime.save(document, str(saved))
    ids = tmp_path / "ids.jsonl"
    ids.write_text(json.dumps({"continuation_ids": answer.ids}))
    given = [f"model.path={chat}", f"score.path={ids}", "question=Who left?", *THREADS]
    for source in (f"document.load={saved}", f"document.path={book}"):
        out, _ = run(*given, source)
        found = json.loads(out)
        assert found["is_greedy"] and found["token_ids"] == answer.ids
    out, _ = run(*given[:1], f"document.load={saved}", f"score.path={ids}", *THREADS)
    (score,) = runtime.score(document, [answer.ids])
    assert json.loads(out)["logprob"] == pytest.approx(score.logprob, abs=1e-3)


def test_processes_and_a_pipe(chat, book, tmp_path, runtime):
    path = tmp_path / "score.json"
    given = ["launch.nproc=2", f"model.path={chat}", "document.path=-"]
    given += [f"output.path={path}", "transport.threads_per_rank=1"]
    with open(book) as text:
        done = python("-m", "launch.score", *given, stdin=text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("perplexity ")
    score = runtime.score_text(Path(book).read_text())
    found = json.loads(path.read_text())
    assert (found["world_size"], found["transport"]) == (2, "gloo")
    assert found["perplexity"] == pytest.approx(score.perplexity, rel=1e-5)


def test_wrong_input_is_named_before_weights_load(refused, chat, bare, book, ids_file, tmp_path):
    text, given = f"document.path={book}", [f"model.path={chat}"]
    assert "exactly one of document.path" in refused(*given)
    assert refused(*given, text, "question=Who?").startswith("question=Who?: without score.cont")
    with_query = f"document.ids_path={ids_file([5, 6])}"
    assert "drop query_ids" in refused(f"model.path={bare}", with_query)
    assert "2 or more" in refused(f"model.path={bare}", f"document.ids_path={ids_file([5], ())}")
    bad = tmp_path / "bad.jsonl"
    for content, why in [
        ("x", "is not JSON"),
        ("{}", '{"continuation": "..."}'),
        ('{"continuation": ""}', "is empty"),
        ('{"continuation_ids": []}', "is empty"),
        ('{"continuation_ids": null}', "continuation_ids: needed"),
        ('{"continuation": "a", "id": "\\ud83d"}', "holds half a letter"),
        ('{"continuation_ids": [9999]}', "token ids must be from 0"),
        ('{"continuation": "a", "logprob": 1}', "rename it"),
    ]:
        bad.write_text('\n{"continuation": "a"}\n' + content)
        line = refused(*given, text, f"score.path={bad}")
        assert line.startswith(f"score.path={bad}:3: ") and why in line
    assert "is not UTF-8" in refused(*given, text, "score.continuation=a\udcff")
    assert "nothing is generated" in refused(*given, text, "generation.seed=1")
    assert "scored, not kept" in refused(*given, text, "document.save=x")
    assert "score.pieces" in refused(*given, text, "score.pieces=0")
    assert "ends in .png" in refused(*given, text, "score.picture=a.jpg")
    drawn = refused(*given, text, "score.continuation=a", "score.picture=a.png")
    assert drawn.startswith("score.picture=a.png: draws the perplexity of a document")


def test_texts_may_hold_other_characters_that_end_lines(tmp_path):
    path, found = tmp_path / "lines.jsonl", [{"continuation": "a\u2028b\x85c\u2029d"}, {}]
    path.write_text("".join(line_of(line) for line in found), encoding="utf-8")
    assert list(each_line("score.path", str(path), "", dict)) == found


def test_no_matplotlib_and_no_picture_asked_for(run, monkeypatch, tmp_path, chat, book):
    monkeypatch.setattr(launch.pictures, "can_draw", lambda: False)
    path = tmp_path / "r.json"
    _, err = run(f"model.path={chat}", f"document.path={book}", f"output.path={path}", *THREADS)
    assert "no picture: matplotlib is not installed" in err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["r.config.yaml", "r.json"]
