"""What rank 0 knows, on every rank; and what every rank knows, on rank 0."""

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


def bytes_on_rank_0(transport: Transport, mine: bytes) -> list[bytes] | None:
    """What every rank passes, in rank order, on rank 0; None on the others.  Not counted."""
    device, first = transport.device, transport.rank == 0
    size = torch.tensor([len(mine)], device=device)
    sizes = size.new_empty(transport.world_size, 1)
    own = torch.frombuffer(bytearray(mine or b"\0"), dtype=torch.uint8)[: len(mine)].to(device)
    nothing = own.new_empty(0)
    with transport.uncounted():
        transport.all_gather(size, sizes).wait()
        send = [own if rank == 0 else nothing for rank in range(transport.world_size)]
        into = [own.new_empty(int(size) if first else 0) for size in sizes]
        into[transport.rank] = send[transport.rank]
        transport.all_to_all(send, into).wait()
    return [part.cpu().numpy().tobytes() for part in into] if first else None
