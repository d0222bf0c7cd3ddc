"""How much memory a rank may fill with KV."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from platform import node

import psutil
import torch

from ringstar.config import CacheConfig, byte_size
from ringstar.errors import UserError, reason
from ringstar.metrics import gather_integers
from ringstar.models import Shapes
from ringstar.paging import PagePool, Storage
from ringstar.stowed import DiskPlace, HostPlace, Place
from seqpar import Transport

_FRACTION = 0.8
_KINDS = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
# what a control group may use and uses, for version 2 and version 1
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def make_pool(
    config: CacheConfig, shapes: Shapes, dtype: torch.dtype, transport: Transport
) -> tuple[PagePool, str]:
    """One rank's pages, and why they may take so much; every rank makes the same call."""
    device, (hosts,) = transport.device, gather_integers(transport, [_memory_id(transport.device)])
    neighbours = hosts.count(hosts[transport.rank])  # all have loaded the model by now
    if config.max_bytes is not None:
        limit, why = byte_size(config.max_bytes), "as asked"
    else:
        fraction = config.memory_fraction or _FRACTION
        limit = int(fraction * free_memory(device) / neighbours)
        among = f", shared by {neighbours} ranks" if neighbours > 1 else ""
        why = f"{fraction:g} of what is free{among}"
    storage = Storage(dtype, device, _KINDS[config.dtype])
    said = f"KV up to {limit / 2**30:,.2f} GiB on each rank ({why})"
    return PagePool(shapes, storage, config.page_tokens, limit), said


def make_place(config: CacheConfig, device: torch.device) -> Place | None:
    """Where KV goes that makes room for other; raises UserError."""
    if config.offload == "none":
        return None
    if config.offload == "disk":
        return disk_place(config)
    if device.type == "cpu":
        why = "KV is in host memory already; allowed on the CPU: disk, none"
        raise UserError("cache.offload", "host", why)
    return HostPlace()


def disk_place(config: CacheConfig) -> DiskPlace:
    """The folder of `offload=disk`; raises UserError."""
    try:
        return DiskPlace(config.offload_path)
    except (OSError, RuntimeError) as error:  # the latter: a ~name of nobody
        raise UserError("cache.offload_path", config.offload_path, reason(error)) from error


def _memory_id(device: torch.device) -> int:
    """A number that only ranks have in common which share memory."""
    name = [node(), *_texts("/proc/sys/kernel/random/boot_id")]
    if device.type == "cuda":  # which of a machine's GPUs, whatever number a process sees it by
        name.append(str(getattr(torch.cuda.get_device_properties(device), "uuid", device)))
    return int.from_bytes(sha256(" ".join(name).encode()).digest()[:7])


def free_memory(device: torch.device) -> int:
    """Bytes that this process could have, of the device or of the host."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min([psutil.virtual_memory().available, *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """What a container that this runs in leaves."""
    texts = [_texts(*paths) for paths in _GROUPS]
    return [
        max(0, int(each[0]) - int(each[1]))
        for each in texts
        if len(each) == 2 and each[0].isdecimal()  # a group without a limit says "max"
    ]


def _texts(*paths: str) -> list[str]:
    """What these files hold, of those that there are."""
    return [Path(path).read_text().strip() for path in paths if Path(path).is_file()]
