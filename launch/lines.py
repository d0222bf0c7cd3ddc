"""Files of JSON lines that grow: each line is on the disk before the next is begun."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def whole_lines(path: str | Path) -> list[str]:
    """The lines of a file that is there; a run that was killed may have left half a one."""
    whole = _whole(Path(path).expanduser())
    # not `splitlines`: texts may hold other characters that end lines
    return whole.decode("utf-8", "replace").split("\n")[:-1]


def _whole(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def line_of(content: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(content, ensure_ascii=False) + "\n"


class LineLog:
    """Adds lines behind the whole ones of a file; half a line is dropped."""

    def __init__(self, path: str | Path):
        target = Path(path).expanduser()
        whole = len(_whole(target)) if target.exists() else 0
        self._file = target.open("ab")
        self._file.truncate(whole)

    def add(self, content: dict[str, Any]) -> None:
        """One more line, on the disk when this returns."""
        self._file.write(line_of(content).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
