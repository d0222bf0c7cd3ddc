"""What rank 0 knows, on every rank."""

from __future__ import annotations

import torch

from seqpar import Transport


def text_of_rank_0(transport: Transport, text: str | None) -> str | None:
    """A text, or None, as rank 0 has it; what others pass is not looked at."""
    content = text.encode() if text is not None and transport.rank == 0 else b""
    size = torch.tensor([-1 if text is None else len(content)], device=transport.device)
    with transport.uncounted():
        transport.broadcast(size, root=0).wait()
        if int(size) < 0:
            return None
        room = torch.zeros(int(size), dtype=torch.uint8, device=transport.device)
        if transport.rank == 0 and content:
            room.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        if len(room):
            transport.broadcast(room, root=0).wait()
    return bytes(room.tolist()).decode()
