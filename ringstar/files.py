"""Files that are whole or not there."""

from __future__ import annotations

import fcntl
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


def lock(handle: int, *, shared: bool = False) -> bool:
    """Whether nobody else has this file or folder; it is ours until the handle is closed.

    A file system without locks goes without.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
