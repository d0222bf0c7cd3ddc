"""Models and documents for the command line, and ways to run it in this process.

`run` and `refused` are for test modules about one command, a module that they call `COMMAND`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import launch.options
import launch.start
from ringstar.models import ModelFiles
from tests.support.chat import LINES, chat_folder
from tests.support.composing import compose_once
from tests.support.models import tiny_folder

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch):
    monkeypatch.setattr(launch.options, "compose_config", compose_once)


@pytest.fixture
def run(request, capsys):
    """Runs the command, which must end with `status`; returns standard output and error."""

    def run(*arguments: str, status: int = 0) -> tuple[str, str]:
        got = request.module.COMMAND.main(list(arguments))
        out, err = capsys.readouterr()
        assert got == status, err
        return out, err

    return run


@pytest.fixture
def untouched(request, monkeypatch):
    """Neither weights nor ranks may be touched: what is wrong is seen before."""

    def touched(*_, **__):
        raise AssertionError("went on after wrong input")

    monkeypatch.setattr(ModelFiles, "load", touched)
    monkeypatch.setattr(launch.start, "start_ranks", touched)
    monkeypatch.setattr(request.module.COMMAND, "make_ranks", touched)


@pytest.fixture
def refused(run, untouched):
    """Runs the command, which must refuse; returns the one line that it says, after its name."""

    def refused(*arguments: str) -> str:
        out, err = run(*arguments, status=2)
        assert (out, len(err.splitlines())) == ("", 1), (out, err)
        assert err.startswith("ringstar: ")
        return err.removeprefix("ringstar: ").strip()

    return refused


@pytest.fixture(scope="session")
def chat() -> str:
    """A model folder with a tokenizer."""
    return chat_folder()


@pytest.fixture(scope="session")
def bare() -> str:
    """A model folder without a tokenizer: 97 ids."""
    return tiny_folder("llama")


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> str:
    """A text of about 400 tokens, under a path with a space and a `=`."""
    path = tmp_path_factory.mktemp("my books") / "a=b, c.txt"
    path.write_text("\n".join(LINES * 5))
    return str(path)


@pytest.fixture
def ids_file(tmp_path):
    """Writes an ids file; returns its path."""

    def write(context, query=(1, 2, 3)) -> str:
        path = Path(tmp_path) / f"ids-{len(list(tmp_path.iterdir()))}.json"
        content = {"context_ids": context}
        path.write_text(json.dumps(content | ({"query_ids": list(query)} if query else {})))
        return str(path)

    return write
