"""python -m pytest tests/launch/test_profile.py

`profile.path` from the command line: with every command that runs ranks, and on a real model.
"""

import json

import pytest

import launch.ask
import launch.compare
import launch.evaluate
from launch.generate import main
from tests.support.commands import THREADS
from tests.support.traces import bytes_sent, check_format, of_kind, read, seconds

REAL = ["launch.nproc=4", "model=smollm2", "transport.threads_per_rank=1"]


@pytest.mark.slow
def test_a_real_run_agrees_with_its_metrics(tmp_path, capfd):
    """SmolLM2 on four gloo ranks from the command line: to the byte, and within 2% of the times."""
    text = "The ship left the harbour at dawn, and nobody on the quay knew her name. " * 20
    asked = [f"document.text={text}", "question=Who knew her name?", "generation.max_new_tokens=9"]
    to = [f"profile.path={tmp_path}", f"output.path={tmp_path}/result.json"]
    assert main([*REAL, *asked, *to]) == 0
    table = capfd.readouterr().err.partition("exposed communication")[2].splitlines()
    assert [line.split()[1] for line in table[1:]] == ["rank", "0", "1", "2", "3"]
    assert table[1].split()[2:] == ["encode", "question", "decode", "all"]
    trace, result = read(tmp_path), json.loads((tmp_path / "result.json").read_text())
    check_format(trace)
    assert bytes_sent(trace, 4) == result["bytes_sent"]
    ranks = [of_kind(trace, "phase", rank) for rank in range(4)]
    encode = [seconds(p for p in rank if p["name"].startswith("encode")) for rank in ranks]
    decode = [seconds(p for p in rank if p["name"] == "decode") for rank in ranks]
    assert max(encode) == pytest.approx(result["encode_s"], rel=0.02)
    further = len(of_kind(trace, "forward", 0)) - 2  # after the document's and the question's
    assert further >= 4
    assert decode[0] == pytest.approx(result["tpot_s"] * further, rel=0.02)
    layers = [e for e in of_kind(trace, "layer", 0) if e["args"]["phase"].startswith("encode")]
    assert {e["name"] for e in layers} == {f"layer {index}" for index in range(30)}
    assert seconds(layers) == pytest.approx(result["encode_s"], rel=0.1)


def test_the_other_commands_write_one_too(tmp_path, capsys, chat, book):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Who left?"}\n{"question": "When?"}\n')
    given = [f"model.path={chat}", f"document.path={book}", *THREADS]
    given += ["generation.max_new_tokens=4"]
    ask = [f"questions.path={questions}", f"output.path={tmp_path}/answers.jsonl"]
    assert launch.ask.main([*given, *ask, f"profile.path={tmp_path}/ask"]) == 0
    few = ["question=Who left?", "compare.star=block_size=64", "compare.needles=0"]
    assert launch.compare.main([*given, *few, f"profile.path={tmp_path}/compare"]) == 0
    assert capsys.readouterr().err.count("ringstar: trace of 2 ranks: ") == 2
    asked, compared = read(tmp_path / "ask"), read(tmp_path / "compare")
    check_format(asked)
    check_format(compared)
    assert [e["name"] for e in of_kind(asked, "phase", 0)].count("question") == 2
    assert [e["name"] for e in of_kind(compared, "phase", 1)].count("encode") == 3


def test_an_evaluation_writes_one(tmp_path, capsys, chat):
    pytest.importorskip("wonderwords")
    pytest.importorskip("scipy")
    given = ["evaluate.tasks=qa_1", "evaluate.lengths=700", "evaluate.samples=1"]
    to = [f"profile.path={tmp_path}/trace", f"output.path={tmp_path}/e.json"]
    assert launch.evaluate.main([f"model.path={chat}", *THREADS, *given, *to]) == 0
    assert capsys.readouterr().err.count("ringstar: trace of 2 ranks: ") == 1
    check_format(trace := read(tmp_path / "trace"))
    assert [e["name"] for e in of_kind(trace, "phase", 1)].count("encode") == 1 + 3  # one warms up


def test_a_file_is_no_folder(capsys, bare, ids_file):
    path = ids_file([1, 2, 3])
    arguments = [f"model.path={bare}", f"document.ids_path={path}", f"profile.path={path}"]
    assert main(arguments) == 2
    assert "profile.path=" in capsys.readouterr().err
