"""Files of JSON lines that grow: each line is on the disk before the next is begun."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from launch.faults import Fault
from ringstar.errors import UserError, reason
from ringstar.files import lock

_TAKEN = "another run is adding to it; give another output.path, or let it end"


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
    """Adds lines behind the whole ones of a file, which no other run adds to meanwhile.

    Half a line is dropped.  Raises UserError, naming `output.path`, if another run has the file, or
    has added to the `before` lines that were read of it; Fault if a line cannot be written.
    """

    def __init__(self, path: str | Path, before: int | None = None):
        self._path = Path(path).expanduser()
        self._file = self._path.open("ab", buffering=0)
        if not lock(self._file.fileno()):
            raise UserError("output.path", path, _TAKEN)
        whole = _whole(self._path)
        if before not in (None, whole.count(b"\n")):
            self._file.close()
            raise UserError("output.path", path, "another run has just added to it; start again")
        self._file.truncate(len(whole))

    def add(self, content: dict[str, Any]) -> None:
        """One more line, on the disk when this returns."""
        left = memoryview(line_of(content).encode())
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            why = f"cannot be written: {reason(error)}"
            raise Fault(f"output.path={self._path}: {why}") from error

    def close(self) -> None:
        """Other runs may add to it."""
        self._file.close()


def check_free(path: str | Path) -> None:
    """Raise UserError, naming `output.path`, if another run is adding lines to this file."""
    target = Path(path).expanduser()
    if target.exists():
        with target.open("rb") as file:
            if not lock(file.fileno(), shared=True):  # every rank may look at once
                raise UserError("output.path", path, _TAKEN)
