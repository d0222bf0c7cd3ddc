"""python -m pytest tests/launch/test_generate.py

The three ways to start give the same answer; results are whole, typed and written atomically.
"""

import errno
import io
import json
import os
import pty
import shutil
import sys
import termios
import threading
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

import launch.generate
from launch.generate import main
from launch.inputs import standard_input_kept
from launch.options import parse
from ringstar.engine import RankEngine
from ringstar.files import write_atomically
from tests.support.commands import THREADS, TORCHRUN, python

SAMPLED = ["generation.temperature=1.5", "generation.top_p=0.9", "generation.seed=3"]
QUESTION = "question=What's the ship's \"name\" (if it has one), [42] = null;\n船?"

FIELDS = {
    "answer": str,
    "answer_ids": list,
    "context_tokens": int,
    "query_tokens": int,
    "new_tokens": int,
    "finish_reason": str,
    "strategy": str,
    "layout": str | None,
    "block_size": int | None,
    "anchor_size": int | None,
    "world_size": int,
    "transport": str,
    "kernel": str,
    "dtype": str,
    "device": str,
    "cached_tokens": int,
    "encode_s": float,
    "ttft_s": float,
    "tpot_s": float,
    "tokens_per_s": float,
    "peak_memory_bytes": list,
    "kv_bytes": list,
    "bytes_sent": list,
    "kv_error": list | None,
}


@pytest.fixture
def run(tmp_path, capsys):
    """Runs main; returns the result, standard output and standard error."""
    path = tmp_path / "result =1.json"

    def run(*arguments: str, status: int = 0):
        got = main([*arguments, f"output.path={path}"])
        out, err = capsys.readouterr()
        assert got == status, err
        return (json.loads(path.read_text()) if path.exists() else None), out, err

    return run


def check_result(result, world: int) -> None:
    assert list(result) == list(FIELDS)
    assert all(isinstance(result[name], kind) for name, kind in FIELDS.items())
    assert (result["layout"] is None) == (result["strategy"] != "ring")
    assert (result["block_size"] is None) == (result["strategy"] != "star")
    for name in ("peak_memory_bytes", "kv_bytes", "bytes_sent"):
        assert len(result[name]) == world
        assert all(type(value) is int and value >= 0 for value in result[name])
    assert len(result["answer_ids"]) == result["new_tokens"]
    assert all(type(value) is int for value in result["answer_ids"])
    assert result["finish_reason"] in ("stop", "length")
    assert result["world_size"] == world
    assert 0 < result["encode_s"] < result["ttft_s"]
    assert sum(result["kv_bytes"]) > 0


def test_result_and_what_is_written_beside_it(run, tmp_path, chat, book):
    logits = tmp_path / "logits.safetensors"
    result, out, err = run(
        f"model.path={chat}",
        f"document.path={book}",
        QUESTION,
        *THREADS,
        "generation.max_new_tokens=12",
        "generation.stop=never, = ever",
        f"output.first_logits={logits}",
    )
    check_result(result, world=2)
    assert out == result["answer"] + "\n"
    assert (result["strategy"], result["layout"]) == ("ring", "zigzag")
    assert (result["transport"], result["dtype"]) == ("threads", "float32")
    first = load_file(logits)
    assert list(first) == ["first_token_logits"]
    assert str(first["first_token_logits"].dtype) == "torch.float32"
    assert first["first_token_logits"].shape == (json.loads(_config(chat))["vocab_size"],)
    assert int(first["first_token_logits"].argmax()) == result["answer_ids"][0]
    config = yaml.safe_load((tmp_path / "result =1.config.yaml").read_text())
    assert config["question"] == QUESTION.partition("=")[2]
    assert config["document"]["path"] == book
    assert config["generation"]["stop"] == ["never, = ever"]
    assert all(line.startswith("ringstar: ") for line in err.splitlines())


def _config(folder: str) -> str:
    return (Path(folder) / "config.json").read_text()


def test_dense_and_ring_agree_and_a_second_run_overwrites(run, tmp_path, chat, book):
    arguments = [f"model.path={chat}", f"document.path={book}", QUESTION]
    ring, *_ = run(*arguments, *THREADS, "generation.max_new_tokens=6")
    dense, out, _ = run(*arguments, "strategy=dense", "generation.max_new_tokens=9")
    assert dense["answer_ids"][:6] == ring["answer_ids"]
    assert (dense["strategy"], dense["layout"], dense["world_size"]) == ("dense", None, 1)
    assert out == dense["answer"] + "\n"
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "result =1.config.yaml",
        "result =1.json",
    ]


def test_star_is_the_same_on_one_rank_and_says_how_it_encodes(run, chat, book):
    arguments = [f"model.path={chat}", f"document.path={book}", QUESTION, "strategy=star"]
    arguments += ["strategy.block_size=64", "generation.max_new_tokens=6"]
    many, _, err = run(*arguments, *THREADS, "strategy.anchor_size=20")
    one, *_ = run(*arguments, "strategy.anchor_size=20")
    check_result(many, world=2)
    assert many["answer_ids"] == one["answer_ids"]
    assert (many["block_size"], many["anchor_size"]) == (64, 20)
    assert "blocks of 64 tokens (as asked), anchor of 20 tokens computed once and bro" in err
    *_, err = run(*arguments[:-2], *THREADS, "strategy.anchor_positions=random")
    assert "computed for each block (anchor_positions=random differs from block to block)" in err
    exact, _, err = run(*arguments[:-2], "strategy.block_size=4K", "generation.max_new_tokens=6")
    assert "one block of all" in err
    assert (
        exact["answer_ids"] == run(*arguments[:3], "generation.max_new_tokens=6")[0]["answer_ids"]
    )


def test_stop_text_ends_the_answer(run, chat, book):
    arguments = [f"model.path={chat}", f"document.path={book}", QUESTION]
    arguments += SAMPLED
    whole, *_ = run(*arguments, "generation.max_new_tokens=20")
    stop = whole["answer"][5:7]
    cut, out, _ = run(*arguments, "generation.stop=~none~", f"generation.stop={stop}")
    assert cut["answer"] == whole["answer"][: whole["answer"].index(stop)]
    assert cut["finish_reason"] == "stop"
    assert out == cut["answer"] + "\n"


OURS = ["-m", "launch.generate"]
# how ranks are started, and where the document comes from
STARTS = {
    "nproc": (OURS, ["launch.nproc=2", "document.path=-"]),
    "torchrun": ([*TORCHRUN, "2", *OURS], ["document.path={book}"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "starts"),
    [
        (["strategy=ring"], ["nproc", "torchrun"]),
        # by `launch.nproc` star answers in test_compare.py
        (["strategy=star", "strategy.block_size=70"], ["torchrun"]),
    ],
    ids=["ring", "star"],
)
def test_three_ways_to_start(tmp_path, chat, book, capsys, strategy, starts):
    """Sampled with a seed; the document is a file, a pipe to our launcher, and a file again."""
    shared = [f"model.path={chat}", QUESTION, *SAMPLED, *strategy, "generation.max_new_tokens=16"]
    path = tmp_path / "threads.json"
    assert main([*shared, *THREADS, f"document.path={book}", f"output.path={path}"]) == 0
    results = {"threads": json.loads(path.read_text())}
    for name in starts:
        command, options = STARTS[name]
        path = tmp_path / f"{name}.json"
        given = [*shared, *(o.format(book=book) for o in options), f"output.path={path}"]
        with open(book) as text:
            done = python(*command, *given, stdin=text)
        assert done.returncode == 0, done.stderr
        results[name] = json.loads(path.read_text())
        assert done.stdout == results[name]["answer"] + "\n"
        assert results[name]["transport"] in ("gloo", "nccl")
        assert "%" not in done.stderr  # no bar where nobody watches
        config = yaml.safe_load((tmp_path / f"{name}.config.yaml").read_text())
        assert "report" not in config["launch"]
    for result in results.values():
        check_result(result, world=2)
    assert len({tuple(result["answer_ids"]) for result in results.values()}) == 1
    assert len({result["query_tokens"] for result in results.values()}) == 1


@pytest.mark.parametrize("text", ["42", "null", "${oc.env:HOME}", "${unclosed", "'", "[a, b]"])
def test_text_that_looks_like_a_value(run, tmp_path, chat, text):
    arguments = [f"model.path={chat}", "generation.max_new_tokens=2"]
    given, *_ = run(*arguments, f"document.text={text}", f"question={text}")
    (tmp_path / "text").write_text(text)
    paths = [f"document.path={tmp_path}/text", f"question_path={tmp_path}/text"]
    read, *_ = run(*arguments, *paths)
    for name in ("context_tokens", "query_tokens", "answer_ids"):
        assert given[name] == read[name]


def test_sampling_depends_on_the_seed(run, chat, book):
    arguments = [f"model.path={chat}", f"document.path={book}", QUESTION, *SAMPLED[:2]]
    arguments += ["generation.max_new_tokens=16"]
    answers = [
        tuple(run(*arguments, *world, f"generation.seed={seed}")[0]["answer_ids"])
        for seed, world in ((3, []), (3, THREADS), (4, []))
    ]
    assert answers[0] == answers[1] != answers[2]


def test_document_on_standard_input(run, monkeypatch, chat, book):
    arguments = [f"model.path={chat}", QUESTION, "generation.max_new_tokens=4"]
    content = Path(book).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    piped, *_ = run(*arguments, "document.path=-")
    read, *_ = run(*arguments, f"document.path={book}")
    assert piped["answer_ids"] == read["answer_ids"]
    assert piped["context_tokens"] == read["context_tokens"]


@pytest.mark.parametrize("key", ["document.path", "question_path"])
def test_a_named_pipe_is_kept_for_the_ranks(tmp_path, key):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("some text",))
    writer.start()
    with standard_input_kept(parse([f"{key}={pipe}"])) as (config, copies):
        assert list(copies) == [key]
        assert Path(copies[key]).read_text() == "some text"
        kept = config.document.path if key == "document.path" else config.question_path
        assert kept == copies[key]
    writer.join()
    assert not Path(copies[key]).exists()


def test_one_token_document_and_ids_without_a_tokenizer(run, ids_file, bare):
    result, out, _ = run(
        f"model.path={bare}", f"document.ids_path={ids_file([5])}", "generation.max_new_tokens=3"
    )
    check_result(result, world=1)
    assert (result["context_tokens"], result["query_tokens"]) == (1, 3)
    assert result["answer"] == ""
    assert out.split() == [str(i) for i in result["answer_ids"]]


def test_more_ranks_than_tokens(run, ids_file, bare):
    arguments = [f"model.path={bare}", f"document.ids_path={ids_file([5, 6, 7])}"]
    arguments += ["generation.max_new_tokens=8"]
    many, *_ = run(*arguments, "transport=threads", "transport.world_size=7")
    one, *_ = run(*arguments)
    check_result(many, world=7)
    assert many["answer_ids"] == one["answer_ids"]


def test_bar_with_the_time_left_on_a_terminal_only(run, monkeypatch, chat, book):
    arguments = [f"model.path={chat}", f"document.path={book}", QUESTION, *THREADS]
    arguments += ["encode.chunk_tokens=64", "generation.max_new_tokens=2"]
    _, _, err = run(*arguments)
    assert "%" not in err
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with open(terminal, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        run(*arguments)
        stderr.flush()
        shown = os.read(controller, 1 << 16).decode()
    os.close(controller)
    assert "0%" in shown
    assert "left" in shown


# -- when writing fails --------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("key", ["output.path", "output.first_logits"])
def test_full_disk(full_disk, tmp_path, capsys, chat, book, key):
    path = tmp_path / "old"
    path.write_text("what was there before")
    status = main([f"model.path={chat}", f"document.path={book}", QUESTION, f"{key}={path}"])
    out, err = capsys.readouterr()
    assert status == 1
    assert len(out.strip()) > 0  # the answer is not lost
    faults = [line for line in err.splitlines() if "fault" in line]
    assert faults == [f"ringstar: fault: {key}={path}: cannot be written: no space left on device"]
    assert err.splitlines()[-1] == faults[0]
    assert path.read_text() == "what was there before"
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_write_is_whole_or_not_at_all(full_disk, tmp_path):
    target = tmp_path / "target"
    with pytest.raises(OSError, match="No space"):
        write_atomically(target, b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_bytes() == b"new"


def test_a_reader_who_leaves_does_not_end_the_run(run, monkeypatch, chat, book):
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, open(writing, "w") as gone:
        patch.setattr(sys, "stdout", gone)
        result, *_ = run(f"model.path={chat}", f"document.path={book}", QUESTION)
    check_result(result, world=1)


# -- faults in this process ------------------------------------------------------------------


def test_fault_of_a_simulated_rank(run, monkeypatch, chat, book):
    encode = RankEngine.encode

    def failing(self, *arguments):
        if self._transport.rank == 1:
            self._transport.publish("encode chunk 3 of 5")
            raise ZeroDivisionError("no such luck\nand a second line")
        return encode(self, *arguments)

    monkeypatch.setattr(RankEngine, "encode", failing)
    arguments = [f"model.path={chat}", f"document.path={book}", QUESTION, *THREADS]
    result, out, err = run(*arguments, status=1)
    assert (result, out) == (None, "")
    assert err.splitlines()[-1].startswith("ringstar: fault: ZeroDivisionError: no such luck (")
    assert "rank 1, during encode chunk 3 of 5" in err.splitlines()[-1]
    assert len([line for line in err.splitlines() if "fault" in line]) == 1
    assert "Traceback" not in err
    _, _, err = run(*arguments, "launch.traceback=true", status=1)
    assert "Traceback" in err


@pytest.mark.parametrize("damage", ["lacking", "misshapen"])
def test_weights_of_another_model(run, tmp_path, chat, damage):
    folder = Path(shutil.copytree(chat, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    damaged = {"lacking": {}, "misshapen": {name: weights[name][:-1].clone()}}[damage]
    rest = {key: value for key, value in weights.items() if key != name}
    save_file(rest | damaged, folder / "model.safetensors", {"format": "pt"})
    _, out, err = run(f"model.path={folder}", "document.text=a", QUESTION, *THREADS, status=2)
    assert out == ""
    assert err.splitlines()[-1].startswith(f"ringstar: model.path={folder}: weights ")
    assert len([line for line in err.splitlines() if "model.path" in line]) == 1
    assert "Traceback" not in err


def test_interrupt_is_quiet(monkeypatch, capsys, chat):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.generate, "run_rank", interrupted)
    assert main([f"model.path={chat}"]) == 130
    assert capsys.readouterr() == ("", "")
