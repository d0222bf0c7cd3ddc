"""What was measured, a line of JSON for each cell as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

from ringstar.models.work import ModelWork
from ringstar.timed import Timed


@dataclass(frozen=True, slots=True)
class Load:
    """One point of the grid: prompts of `length` tokens, `batch` of them in a call."""

    length: int
    batch: int


# what a cell is before anything of it is known
Key = tuple[str, int, int, int]


@dataclass(frozen=True)
class Measured:
    """One cell: who, where, and each request's times in seconds; or why it has none.

    `transport` and `kernel` are those of ours.  `cpu_s` is that of all processes, of all calls;
    `peak_memory_bytes` of each rank, model included.  `ids` are the first request's answer.
    """

    contender: str
    world: int
    length: int
    batch: int
    why_not: str | None = None
    transport: str | None = None
    kernel: str | None = None
    duration_s: float = 0.0
    cpu_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    # of each request, from when it was asked
    token_s: list[list[float]] = field(default_factory=list)
    peak_memory_bytes: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    @property
    def key(self) -> Key:
        return self.contender, self.world, self.length, self.batch


@dataclass(frozen=True)
class AttentionTimes:
    """Seconds of each call of attention alone, causal, over all ranks; or why there are none."""

    contender: str
    world: int
    length: int
    seconds: list[float] = field(default_factory=list)
    why_not: str | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.contender, self.world, self.length


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at most with all that one process may use, measured, and the model's
    floor: products and bytes a second, and what each token needs (`ModelWork`)."""

    flops_per_s: float
    bytes_per_s: float
    # GPUs that ranks may have one each of; 1 where all share the processor
    gpus: int
    work: ModelWork

    def devices(self, world: int) -> int:
        """Of so many ranks."""
        return min(world, self.gpus)

    def ttft_s(self, tokens: int, devices: int = 1) -> float:
        """The least time to read a prompt: all its products, as fast as products can be."""
        return self.work.prompt_flops(tokens) / self.flops_per_s / devices

    def tpot_s(self, past: int, batch: int = 1, devices: int = 1) -> float:
        """The least time of a step: weights once, which every device has, and its share of each
        prompt's KV, as fast as memory gives them."""
        kv_bytes = batch * self.work.kv_bytes(past) / devices
        return (self.work.weight_bytes + kv_bytes) / self.bytes_per_s


def highest(found: Sequence[Ceilings]) -> Ceilings | None:
    """What several looks at the machine showed together: something else may have run during one."""
    if not found:
        return None
    most_flops, most_bytes = (max(getattr(each, rate) for each in found) for rate in _RATES)
    return replace(found[0], flops_per_s=most_flops, bytes_per_s=most_bytes)


_RATES = ("flops_per_s", "bytes_per_s")
Line = Measured | AttentionTimes | Ceilings
_KINDS: dict[str, Callable[..., Line]] = {
    "Measured": Measured,
    "AttentionTimes": AttentionTimes,
    "Ceilings": lambda work, **rates: Ceilings(work=ModelWork.from_dict(work), **rates),
}


def measured(
    who: tuple[str, int],
    load: Load,
    calls: Sequence[Timed],
    cpu_s: float,
    peaks: list[int],
    transport: str | None = None,
    kernel: str | None = None,
) -> Measured:
    """A cell from the calls that were measured: times from each request on."""
    requests = [(call.asked_s, times) for call in calls for times in call.token_s]
    return Measured(
        *who,
        load.length,
        load.batch,
        duration_s=sum(max(map(max, call.token_s)) - call.asked_s for call in calls),
        cpu_s=cpu_s,
        ttft_s=[times[0] - asked for asked, times in requests],
        token_s=[[time - asked for time in times] for asked, times in requests],
        peak_memory_bytes=peaks,
        transport=transport,
        kernel=kernel,
        ids=calls[0].ids[0],
    )


def all_rounds(cells: Iterable[Measured]) -> dict[Key, Measured]:
    """Each cell with the calls of all rounds that it was measured in."""
    return {key: _joined(each) for key, each in _by_key(cells).items()}


def _joined(rounds: Sequence[Measured]) -> Measured:
    done = [each for each in rounds if each.why_not is None]
    if not done:
        return rounds[0]
    peaks = zip(*(each.peak_memory_bytes for each in done), strict=True)
    return replace(
        done[0],
        duration_s=sum(each.duration_s for each in done),
        cpu_s=sum(each.cpu_s for each in done),
        ttft_s=[seconds for each in done for seconds in each.ttft_s],
        token_s=[times for each in done for times in each.token_s],
        peak_memory_bytes=[max(each) for each in peaks],
    )


def all_attention(lines: Iterable[AttentionTimes]) -> list[AttentionTimes]:
    """Each one with the calls of all rounds."""
    return [
        replace(rounds[0], seconds=[seconds for each in rounds for seconds in each.seconds])
        for rounds in _by_key(lines).values()
    ]


def _by_key(lines: Iterable[Any]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for line in lines:
        found.setdefault(line.key, []).append(line)
    return found


def add_line(path: str, line: Line) -> None:
    """Append it; a line before it that was cut off stays one of its own."""
    text = json.dumps({"kind": type(line).__name__, **asdict(line)})
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\n{text}\n")


class LineReader:
    """Follows a file while others write it; `seen` is called for each line, in order."""

    def __init__(self, path: Path, seen: Callable[[Line], None], every_s: float = 0.2):
        self.lines: list[Line] = []
        self._path, self._seen, self._every_s = path, seen, every_s
        self._stop, self._at = Event(), 0
        self._thread = Thread(target=self._follow, daemon=True)

    def __enter__(self) -> LineReader:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._read()

    def _follow(self) -> None:
        while not self._stop.wait(self._every_s):
            self._read()

    def _read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole + newline)
        for text in whole.splitlines():
            if line := _line(text):
                self.lines.append(line)
                self._seen(line)


def _line(text: bytes) -> Line | None:
    """None for one that was cut off."""
    try:
        fields = json.loads(text)
    except ValueError:
        return None
    return _KINDS[fields.pop("kind")](**fields)
