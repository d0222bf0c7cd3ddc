"""python -m pytest tests/launch/test_documents.py

Documents that are kept: `document.save` and `document.load` of `launch.generate`.
"""

import json

import pytest

import ringstar.kept
from launch.generate import main

QUESTION = "question=What's the ship's name?"
THREADS = ["transport=threads", "transport.threads_per_rank=1"]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs main; returns the result and standard error."""

    def run(*arguments, status=0):
        path = tmp_path / "result.json"
        got = main([*arguments, QUESTION, "generation.max_new_tokens=8", f"output.path={path}"])
        _, err = capsys.readouterr()
        assert got == status, err
        return (json.loads(path.read_text()) if not status else None), err

    return run


@pytest.fixture
def kept(run, tmp_path, chat, book):
    """A document that was encoded by three ranks, and its answer."""
    folder = tmp_path / "kept, = here"
    three = [*THREADS, "transport.world_size=3"]
    saving = [f"model.path={chat}", f"document.path={book}", f"document.save={folder}", *three]
    result, err = run(*saving)
    assert f"tokens saved to {folder}" in err
    return folder, result


def test_a_saved_document_is_asked_again(run, chat, kept):
    folder, first = kept
    for world in (1, 2):
        loading = [f"model.path={chat}", f"document.load={folder}", *THREADS]
        result, err = run(*loading, f"transport.world_size={world}")
        assert f"encoded by ring over 3 ranks, dealt to {world}" in err and "encode:" not in err
        for name in ("answer", "context_tokens", "query_tokens"):
            assert result[name] == first[name]
        assert sum(result["kv_bytes"]) == sum(first["kv_bytes"])
        assert sum(result["bytes_sent"]) < sum(first["bytes_sent"])


def test_star_is_asked_again_with_the_blocks_that_it_has(run, chat, book, tmp_path):
    """Of other ranks' share a block would be shorter than its anchor."""
    folder, two = tmp_path / "kept", [*THREADS, "transport.world_size=2"]
    given = [f"model.path={chat}", "strategy=star", "strategy.anchor_size=100"]
    first, _ = run(*given, f"document.path={book}", f"document.save={folder}", *two)
    eight = [*THREADS, "transport.world_size=8"]
    again, _ = run(given[0], f"document.load={folder}", *eight)
    for name in ("answer", "strategy", "block_size", "anchor_size"):
        assert again[name] == first[name]
    assert first["context_tokens"] / 8 < 100 <= first["block_size"]


@pytest.mark.slow
def test_so_it_is_by_processes(run, chat, kept, tmp_path):
    folder, first = kept
    again = tmp_path / "again"
    two = ["launch.nproc=2", f"document.load={folder}", f"document.save={again}"]
    assert run(f"model.path={chat}", *two)[0]["answer"] == first["answer"]
    result, _ = run(f"model.path={chat}", f"document.load={again}", *THREADS)
    assert result["answer"] == first["answer"]


def test_an_encode_with_checkpoints_is_the_same_and_takes_up_what_is_there(
    run, chat, book, kept, tmp_path, monkeypatch
):
    folder = tmp_path / "in parts"
    given = [f"model.path={chat}", f"document.path={book}", f"document.save={folder}"]
    given += [*THREADS, "document.checkpoint_every=2", "encode.chunk_tokens=20"]
    write, parts = ringstar.kept.write, []

    def stops(*arguments):
        parts.append(1)
        if len(parts) == 3:
            raise RuntimeError("the power failed")
        return write(*arguments)

    monkeypatch.setattr(ringstar.kept, "write", stops)
    _, err = run(*given, "transport.world_size=3", status=1)
    assert "the power failed" in err and not folder.exists()
    monkeypatch.undo()
    result, err = run(*given, "transport.world_size=2")
    assert "240 of" in err and "tokens are encoded already" in err
    assert result["answer"] == kept[1]["answer"]
    loading = [f"model.path={chat}", f"document.load={folder}", *THREADS]
    assert run(*loading)[0]["answer"] == kept[1]["answer"]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["document.checkpoint_every=2"], "document.checkpoint_every=2: needs document.save"),
        (
            ["document.checkpoint_every=0", "document.save=a"],
            "document.checkpoint_every=0: allowed",
        ),
        (
            ["document.checkpoint_every=2", "document.save=a", "strategy=star"],
            "document.checkpoint_every=2: star encodes in any order",
        ),
    ],
)
def test_wrong_checkpoints_are_refused(more, why, run, chat, book):
    _, err = run(f"model.path={chat}", f"document.path={book}", *more, status=2)
    assert why in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("nproc", [[], ["launch.nproc=2"]])
def test_a_damaged_document_is_one_line(run, chat, kept, nproc):
    folder, _ = kept
    file = next(folder.glob("data-*/*rank-00002*"))
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)
    loading = [f"model.path={chat}", f"document.load={folder}"]
    _, err = run(*loading, *(nproc or THREADS), status=2)
    wrong = [line for line in err.splitlines() if "damaged" in line]
    assert len(wrong) == 1 and wrong[0].startswith(f"ringstar: document.load={folder}: damaged: ")
    assert "Traceback" not in err


def test_wrong_folders_are_refused_before_weights_load(run, chat, book, tmp_path, monkeypatch):
    def touched(*_, **__):
        raise AssertionError("went on after wrong input")

    monkeypatch.setattr("ringstar.models.ModelFiles.load", touched)
    model, text = f"model.path={chat}", f"document.path={book}"
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter.txt").write_text("dear")
    for given, what in (
        ([f"document.load={tmp_path / 'none'}"], "holds no saved document"),
        ([f"document.load={full}"], "holds no saved document"),
        ([text, f"document.load={full}"], "given: document.path and document.load"),
        ([text, f"document.save={full}"], "is a folder that holds other things"),
        ([text, f"document.save={full}/letter.txt"], "document.save="),
        ([text, "document.save=/proc/nothing/here"], "no such file or directory"),
    ):
        _, err = run(model, *given, *THREADS, status=2)
        assert what in err and len(err.splitlines()) == 1
