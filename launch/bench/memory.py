"""The most memory that a process had since it was last asked."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

from ringstar.metrics import peak_memory

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5)


def reset_peak(device: torch.device) -> None:
    """From here on anew, where the system can (CUDA, Linux); elsewhere peaks only grow.

    On Linux what was freed goes back to the system first: glibc keeps it, and it would count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return


def peak_since(device: torch.device) -> int:
    """Bytes: of the CUDA allocator, else resident ones of the process."""
    if device.type != "cuda" and _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_memory(device)
