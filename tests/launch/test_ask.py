"""python -m pytest tests/launch/test_ask.py

Many questions about one document: from a file, in order and resumable; or typed.
"""

import fcntl
import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import launch.ask
from launch.generate import main as generate
from launch.questions import RESULT_FIELDS
from ringstar import LongContext
from ringstar.exchange import text_of_rank_0
from tests.support.commands import THREADS, environment, json_lines, python
from tests.support.models import LONGROPE, tiny_folder
from tests.support.ranks import in_processes, in_threads

COMMAND = launch.ask
QUESTIONS = [
    {"question": "Who left?", "id": 7},
    {"gold": "Aurora", "question": "What's the ship's \"name\"? 船"},
    {"query_ids": [5, 6, 7], "tags": ["a", None]},
]


@pytest.fixture
def asked(tmp_path, chat, book):
    """The arguments of a run, and where its answers go."""
    path = tmp_path / "questions, 1.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in QUESTIONS))
    out = tmp_path / "answers =1.jsonl"
    given = [f"model.path={chat}", f"document.path={book}", f"questions.path={path}"]
    return [*given, f"output.path={out}", "generation.max_new_tokens=8"], out


def test_answers_come_in_order_with_what_the_lines_had(run, asked, capsys, tmp_path, chat, book):
    arguments, path = asked
    run(*arguments, *THREADS)
    answers = json_lines(path)
    for line, answer in zip(QUESTIONS, answers, strict=True):
        assert {key: answer[key] for key in line} == line
        assert list(answer)[len(line) :] == list(RESULT_FIELDS)
        assert answer["ttft_s"] > 0 and answer["finish_reason"] in ("stop", "length")
    single = tmp_path / "single.json"
    one = [f"model.path={chat}", f"document.path={book}", f"output.path={single}", *THREADS]
    generate([*one, "question=Who left?", "generation.max_new_tokens=8"])
    assert json.loads(single.read_text())["answer_ids"] == answers[0]["answer_ids"]


def test_a_run_goes_on_where_it_was(run, asked):
    arguments, path = asked
    run(*arguments, *THREADS)
    whole = path.read_text()
    first, second, _ = whole.splitlines(keepends=True)
    path.write_text(first + second + '{"question": "Wh')  # killed in the middle of a line
    _, err = run(*arguments, *THREADS)
    assert f"2 of 3 questions are answered in {path}" in err
    assert path.read_text().startswith(first + second)
    assert [a["answer_ids"] for a in json_lines(path)] == [
        json.loads(line)["answer_ids"] for line in whole.splitlines()
    ]
    done = path.read_text()
    run(*arguments, *THREADS)
    assert path.read_text() == done


def test_without_a_file_answers_go_to_standard_output(run, asked):
    arguments, _ = asked
    kept = [argument for argument in arguments if not argument.startswith("output")]
    out, _ = run(*kept, *THREADS)
    assert [json.loads(line).get("id") for line in out.splitlines()] == [7, None, None]


def test_follow_ups_see_what_came_before_also_when_a_run_goes_on(run, asked, chat, book):
    arguments, path = asked
    run(*arguments, *THREADS, "questions.follow_up=true")
    whole = json_lines(path)
    ring = LongContext.from_pretrained(chat, transport="threads", world_size=2, threads_per_rank=1)
    talk = ring.converse(ring.encode(Path(book).read_text()))
    for line, answer in zip(QUESTIONS, whole, strict=True):
        question = line.get("question") or line["query_ids"]
        assert talk.ask(question, max_new_tokens=8).ids == answer["answer_ids"]
    for done in (1, 2):
        path.write_text("".join(f"{json.dumps(answer)}\n" for answer in whole[:done]))
        run(*arguments, *THREADS, "questions.follow_up=true")
        assert [a["answer_ids"] for a in json_lines(path)] == [a["answer_ids"] for a in whole]
    _, err = run(*arguments, *THREADS, status=2)
    assert "was begun with another questions.follow_up" in err


@pytest.mark.slow
def test_processes_answer_alike_and_from_a_saved_document(run, asked, tmp_path, book):
    arguments, path = asked
    run(*arguments, *THREADS, f"document.save={tmp_path / 'kv'}")
    want = [answer["answer_ids"] for answer in json_lines(path)]
    path.unlink()
    loading = [argument for argument in arguments if argument != f"document.path={book}"]
    run(*loading, f"document.load={tmp_path / 'kv'}", "launch.nproc=3")
    assert [answer["answer_ids"] for answer in json_lines(path)] == want


TYPED = f"Who left?\n\n{'x ' * 5000}\nWhat name?"


def check_typed(path, out, err):
    answers = json_lines(path)
    assert [answer["question"] for answer in answers] == ["Who left?", "What name?"]
    assert out == "".join(f"{answer['answer']}\n" for answer in answers)
    assert "the model's limit is 4096" in err


@pytest.mark.slow
def test_typed_questions_are_answered_until_the_end(asked):
    arguments, path = asked
    kept = [argument for argument in arguments if not argument.startswith("questions")]
    done = python("-m", "launch.ask", *kept, "launch.nproc=2", input=TYPED)
    assert done.returncode == 0, done.stderr
    check_typed(path, done.stdout, done.stderr)


def test_so_they_are_by_simulated_ranks(asked, run, monkeypatch):
    arguments, path = asked
    kept = [argument for argument in arguments if not argument.startswith("questions")]
    monkeypatch.setattr(sys, "stdin", io.StringIO(TYPED))
    check_typed(path, *run(*kept, *THREADS))


def test_a_line_that_is_no_text_is_said_and_passed_over(asked, run, monkeypatch):
    arguments, path = asked
    kept = [argument for argument in arguments if not argument.startswith("questions")]
    typed = io.TextIOWrapper(io.BytesIO(b"Who left?\nWhat \xff name?\nWhat name?\n"))
    monkeypatch.setattr(sys, "stdin", typed)
    _, err = run(*kept, *THREADS)
    assert "question: is not UTF-8 text" in err
    assert [answer["question"] for answer in json_lines(path)] == ["Who left?", "What name?"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [THREADS, ["launch.nproc=2"]], ids=["threads", "gloo"])
def test_ctrl_c_leaves_the_terminal_as_it_was(asked, how):
    kept = [argument for argument in asked[0] if not argument.startswith(("questions", "output"))]
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    before = termios.tcgetattr(terminal)
    command = [sys.executable, "-m", "launch.ask", *kept, *how]
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    own = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
    with subprocess.Popen(command, env=environment(), **own, **streams) as run:
        shown = b""
        while b"? " not in shown:
            assert run.poll() is None, shown
            shown += os.read(controller, 1 << 16)
        deadline = time.monotonic() + 60
        while termios.tcgetattr(terminal) == before:  # it is about to edit a line
            assert time.monotonic() < deadline
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(60) == 130
    assert termios.tcgetattr(terminal) == before
    os.close(terminal)
    os.close(controller)


KILLED = """
import json, os, pathlib, random, signal, sys, time
from launch.ask import main
rounds, path, arguments = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]

def begun():
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(main(arguments))
    return child

def finished():
    return os.waitpid(begun(), 0)[1] == 0

started = time.perf_counter()
assert finished()
typical, want = time.perf_counter() - started, path.read_text()
ids = [json.loads(line)["answer_ids"] for line in want.splitlines()]
rng, seen, whole = random.Random(3), "", 0
path.unlink()
for number in range(rounds):
    child = begun()
    time.sleep(rng.uniform(0.0, typical))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    now = path.read_text() if path.exists() else ""
    assert now.startswith(seen), number
    seen = now[: now.rindex("\\n") + 1] if "\\n" in now else ""
    got = [json.loads(line)["answer_ids"] for line in seen.splitlines()]
    assert got == ids[: len(got)], number
    if len(got) == len(ids):
        whole += 1
        path.unlink()
        seen = ""
assert finished()
assert [json.loads(line)["answer_ids"] for line in path.read_text().splitlines()] == ids
print(rounds, whole)
"""


@pytest.mark.slow
def test_what_was_answered_survives_kill_9(asked, tmp_path):
    """`python -c KILLED 200 ANSWERS ARGUMENTS...` is the long form."""
    arguments, path = asked
    file = tmp_path / "many.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"Who left {n}?"}) for n in range(16)))
    given = [argument for argument in arguments if not argument.startswith("questions")]
    run = python("-c", KILLED, "12", str(path), *given, f"questions.path={file}", *THREADS)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == "12"


def test_a_text_reaches_every_rank():
    for runner in (in_threads, in_processes):
        assert runner(3, _shared) == [["", "Who left? 船", None]] * 3


def _shared(transport):
    mine = transport.rank == 0
    texts = ["", "Who left? 船", None]
    return [text_of_rank_0(transport, text if mine else "other") for text in texts]


# --- refused


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "is not JSON"),
        ("[]", 'needed: {"question": "..."}'),
        ("{}", 'needed: {"question": "..."}'),
        ('{"question": "a", "query_ids": [1]}', 'needed: {"question": "..."}'),
        ('{"question": 5}', "question: is empty, or not text"),
        ('{"question": " "}', "question: is empty, or not text"),
        ('{"query_ids": ["a"]}', "query_ids: needed"),
        ('{"query_ids": [100000]}', "question=100000: token ids must be"),
        ('{"question": "a", "answer": "b"}', "answer: is what the answer will be called"),
        ('{"question": "a", "id": "\\ud83d"}', "holds half a letter"),
        ('{"question": "%s"}' % ("x " * 5000), "the model's limit is 4096"),
    ],
)
def test_wrong_lines_are_named_before_weights_load(line, why, asked, run, monkeypatch):
    monkeypatch.setattr("ringstar.models.ModelFiles.load", _touched)
    arguments, _ = asked
    file = Path(arguments[2].partition("=")[2])
    file.write_text(f'{{"question": "good"}}\n\n{line}\n')
    _, err = run(*arguments, *THREADS, status=2)
    assert f"questions.path={file}:3" in err and why in err and len(err.splitlines()) == 1


def _touched(*_, **__):
    raise AssertionError("went on after wrong input")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["question=a"], "question=a: questions.path has questions"),
        (["output.first_logits=a"], "output.first_logits=a: launch.generate writes those"),
        (["document.load=/none"], "given: document.path and document.load"),
        (["questions.path=/none"], "questions.path=/none: is given twice"),
    ],
)
def test_wrong_options(more, why, asked, run, monkeypatch):
    monkeypatch.setattr("ringstar.models.ModelFiles.load", _touched)
    _, err = run(*asked[0], *more, *THREADS, status=2)
    assert why in err and len(err.splitlines()) == 1


def test_standard_input_is_read_once(asked, run, book):
    arguments = [a for a in asked[0] if not a.startswith(("questions", "document"))]
    _, err = run(*arguments, "document.path=-", *THREADS, status=2)
    assert "questions.path: needed: standard input is the document" in err
    _, err = run(*arguments, "document.path=-", "questions.path=-", *THREADS, status=2)
    assert "standard input is document.path already" in err


def test_answers_to_something_else_are_left_alone(run, asked):
    arguments, path = asked
    run(*arguments, *THREADS)
    before = path.read_text()
    path.write_text('{"question": "Another?", "answer": ""}\n')
    _, err = run(*arguments, *THREADS, status=2)
    assert f"output.path={path}:1: is about another question" in err
    path.write_text(before)
    changed = [a for a in arguments if not a.startswith("generation")]
    _, err = run(*changed, "generation.max_new_tokens=9", *THREADS, status=2)
    assert "was begun with another generation (answers =1.config.yaml)" in err
    questions = Path(arguments[2].partition("=")[2])
    questions.write_text(json.dumps(QUESTIONS[0]))
    _, err = run(*arguments, *THREADS, status=2)
    assert "has 3 answers to 1 questions" in err
    assert path.read_text() == before


def test_what_a_document_says_counts_not_where_it_is(run, asked, tmp_path, book, monkeypatch):
    arguments, path = asked
    run(*arguments, *THREADS)
    before = path.read_text()
    path.write_text(before[: before.index("\n") + 1])
    others = [a for a in arguments if not a.startswith("document.path")]
    text = Path(book).read_text()
    (tmp_path / "copy").write_text(text)
    (tmp_path / "edited").write_text(text.replace("a", "e", 1))
    typed = [a for a in others if not a.startswith("questions.path")]
    for given in (others, typed):
        _, err = run(*given, f"document.path={tmp_path / 'edited'}", *THREADS, status=2)
        assert f"output.path={path}:1: is about another document" in err
    _, err = run(*others, f"document.path={tmp_path / 'copy'}", *THREADS)
    assert "1 of 3 questions are answered" in err and len(json_lines(path)) == 3
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    done = path.read_text()
    run(*others, "document.path=-", *THREADS)
    assert path.read_text() == done


def test_star_goes_on_with_blocks_of_the_same_size(run, asked):
    arguments, path = asked
    star = ["strategy=star", "transport=threads", "transport.threads_per_rank=1"]
    run(*arguments, *star, "transport.world_size=2")
    done = path.read_text()
    _, err = run(*arguments, *star, "transport.world_size=3", status=2)
    assert f"output.path={path}:1: is about another block_size" in err
    size = json.loads(done.splitlines()[0])["block_size"]
    folder = path.parent / "kv"  # as it was saved, whoever loads it
    path.unlink()
    run(*arguments, *star, "transport.world_size=2", f"document.save={folder}")
    loading = [a for a in arguments if not a.startswith("document.path")]
    loading += [f"document.load={folder}", *star]
    done = path.read_text()
    run(*loading, "transport.world_size=3")
    assert path.read_text() == done
    path.unlink()
    ring = [a for a in arguments if "strategy" not in a]
    run(*ring, *THREADS)
    exact = [a for a in loading if a not in star]
    _, err = run(*exact, *THREADS, status=2)
    assert f"output.path={path}:1: is about another block_size" in err
    path.unlink()
    sized = [*star, f"strategy.block_size={size}"]
    run(*arguments, *sized, "transport.world_size=2")
    done = path.read_text()
    run(*arguments, *sized, "transport.world_size=3")
    assert path.read_text() == done


def test_questions_that_rope_keeps_apart_are_refused_before_the_encode(run, tmp_path, monkeypatch):
    ids, questions = tmp_path / "ids.json", tmp_path / "questions.jsonl"
    ids.write_text(json.dumps({"context_ids": [5, 6, 7] * 25}))
    given = [f"model.path={tiny_folder('phi3', **LONGROPE)}", f"document.ids_path={ids}", *THREADS]
    given += [f"questions.path={questions}", "generation.max_new_tokens=2"]
    for lengths, status in (((7, 9), 0), ((2, 3), 0), ((3, 7), 2)):
        questions.write_text("\n".join(json.dumps({"query_ids": [4] * n}) for n in lengths))
        if status:
            monkeypatch.setattr(LongContext, "encode", None)
        _, err = run(*given, status=status)
    assert "this model's rotary embedding depends on the length of the text" in err


def test_files_that_are_no_answers_are_left_alone(run, asked, tmp_path):
    """Not even half a line of them is dropped."""
    arguments, path = asked
    path.write_text("a diary without a line end")
    for given in (arguments, [a for a in arguments if not a.startswith("questions.path")]):
        _, err = run(*given, *THREADS, status=2)
        assert "was begun with another" in err and path.read_text() == "a diary without a line end"
    path.unlink()
    questions = arguments[2].partition("=")[2]
    others = [a for a in arguments if not a.startswith("output.path")]
    _, err = run(*others, f"output.path={questions}", *THREADS, status=2)
    assert f"output.path={questions}: is questions.path too" in err


# --- several documents


@pytest.fixture
def library(tmp_path, chat, book):
    """Three documents that begin alike, and questions about them in turn."""
    text = Path(book).read_text()
    ids = [5, 6, 7, 8] * 30
    documents = tmp_path / "my documents.jsonl"
    documents.write_text(
        "\n".join(
            json.dumps(line)
            for line in (
                {"document": "a book", "path": book, "note": "kept"},
                {"document": "longer", "text": text + "\nThe captain was called Vega."},
                {"document": "ids", "context_ids": ids},
            )
        )
    )
    asked = [
        {"document": name, "question": question}
        for question in ("Who left?", "What name?")
        for name in ("a book", "longer", "ids")
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, asked)))
    out = tmp_path / "answers.jsonl"
    arguments = [f"model.path={chat}", f"questions.documents_path={documents}"]
    arguments += [f"questions.path={questions}", f"output.path={out}"]
    texts = {"a book": text, "longer": text + "\nThe captain was called Vega.", "ids": ids}
    return [*arguments, "generation.max_new_tokens=8"], out, asked, texts


def alone(chat, texts, asked, **options):
    ring = LongContext.from_pretrained(chat, transport="threads", world_size=2, threads_per_rank=1)
    talks = {name: ring.converse(ring.encode(text)) for name, text in texts.items()}
    if options:
        return [talks[q["document"]].ask(q["question"], max_new_tokens=8).ids for q in asked]
    return [
        ring.ask(talks[q["document"]].document, q["question"], max_new_tokens=8).ids for q in asked
    ]


@pytest.mark.parametrize("follow_up", [False, True])
@pytest.mark.parametrize("budget", [[], ["cache.max_bytes=58000", "cache.page_tokens=8"]])
def test_several_documents(follow_up, budget, run, library, chat):
    """With a budget for one of them: each is encoded again when it is asked again."""
    arguments, path, asked, texts = library
    options = [*THREADS, *budget] + ["questions.follow_up=true"] * follow_up
    _, err = run(*arguments, *options)
    want = alone(chat, texts, asked, **{"follow_up": True} if follow_up else {})
    assert [answer["answer_ids"] for answer in json_lines(path)] == want
    assert [answer["document"] for answer in json_lines(path)] == [q["document"] for q in asked]
    assert ("made room for others: it is encoded again" in err) == bool(budget)
    assert budget or "tokens are encoded already" in err
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:4]))
    run(*arguments, *options)
    assert [answer["answer_ids"] for answer in json_lines(path)] == want


def test_a_saved_document_among_others(run, library, chat, book, tmp_path):
    arguments, path, asked, texts = library
    folder = tmp_path / "book.kv"
    save = [f"model.path={chat}", f"document.path={book}", f"document.save={folder}", *THREADS]
    generate([*save, "question=Who left?", "generation.max_new_tokens=1"])
    documents = Path(arguments[1].partition("=")[2])
    first, *others = documents.read_text().splitlines()
    first = json.dumps({"document": "a book", "load": str(folder)})
    documents.write_text("\n".join([first, *others]))
    run(*arguments, *THREADS)
    assert [answer["answer_ids"] for answer in json_lines(path)] == alone(chat, texts, asked)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "is not JSON"),
        ("[]", 'needed: {"document": NAME, "path"'),
        ('{"document": "b"}', 'needed: {"document": NAME, "path"'),
        ('{"document": 5, "text": "b"}', 'needed: {"document": NAME, "path"'),
        ('{"document": "b", "text": "c", "path": "d"}', 'needed: {"document": NAME, "path"'),
        ('{"document": "b", "text": " "}', "text: is empty, or not text"),
        ('{"document": "b", "path": "/none"}', "path=/none: cannot be read"),
        ('{"document": "b", "load": "/none"}', "load=/none: "),
        ('{"document": "b", "context_ids": [100000]}', "document=100000: token ids must be"),
        ('{"document": "ids", "text": "c"}', "document=ids: is the name of two documents"),
    ],
)
def test_wrong_documents_are_named_before_weights_load(line, why, library, run, monkeypatch):
    monkeypatch.setattr("ringstar.models.ModelFiles.load", _touched)
    arguments, *_ = library
    documents = Path(arguments[1].partition("=")[2])
    documents.write_text(documents.read_text() + f"\n{line}\n")
    _, err = run(*arguments, *THREADS, status=2)
    assert f"questions.documents_path={documents}:4" in err and why in err
    assert len(err.splitlines()) == 1


def test_questions_about_no_document(library, run, book):
    arguments, *_ = library
    questions = Path(arguments[2].partition("=")[2])
    questions.write_text('{"question": "a", "document": "c"}')
    _, err = run(*arguments, *THREADS, status=2)
    assert "document=c: names none of questions.documents_path: a book, longer, ids" in err
    _, err = run(*arguments, f"document.path={book}", *THREADS, status=2)
    assert f"document.path={book}: questions.documents_path has the documents" in err
    typed = [argument for argument in arguments if not argument.startswith("questions.path")]
    _, err = run(*typed, *THREADS, status=2)
    assert "questions.path: needed: each names its document" in err
