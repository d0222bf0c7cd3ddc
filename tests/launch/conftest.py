"""Models and documents for the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.chat import LINES, chat_folder
from tests.support.models import tiny_folder

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


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
