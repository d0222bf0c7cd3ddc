"""Files that are whole or not there."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

# a file that is being written; a killed run may leave one
UNFINISHED = ".ringstar-"


def write_atomically(path: str | Path, content: bytes) -> None:
    """The file appears whole; a failure leaves what was there before."""
    target = Path(path).expanduser().resolve()  # a link stays a link
    making = target.parent / f"{UNFINISHED}{uuid.uuid4().hex}"
    try:
        with making.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(making, target)
    except BaseException:
        making.unlink(missing_ok=True)
        raise
