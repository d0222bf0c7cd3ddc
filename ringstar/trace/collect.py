"""A trace from its beginning to its file: recorders, clocks, and what rank 0 puts together."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localflash import Backend
from ringstar.config import ProfileConfig
from ringstar.errors import UserError, reason
from ringstar.exchange import bytes_on_rank_0
from ringstar.files import write_atomically
from ringstar.models import BoundModel
from ringstar.ranks import Ranks
from ringstar.trace.chrome import RankTrace, trace_file
from ringstar.trace.clocks import Alignment, clock_of, measure_offset
from ringstar.trace.compute import TracedModel, hook_layers, traced_backend
from ringstar.trace.recorder import RankRecord, Recorder, Span, Total
from ringstar.trace.summary import summary_lines
from ringstar.trace.transport import TracedRanks, TracedTransport
from seqpar import Transport

FILE = "trace.json"


def check_profile(config: ProfileConfig) -> None:
    """Make the folder of the trace; UserError if the file could not be written there."""
    if config.path is None:
        return
    if not config.path:
        raise UserError("profile.path", "", "allowed: a folder; leave it out for no trace")
    try:
        file = trace_path(config)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent):
            pass
    except FileExistsError as error:
        why = "is a file; the name of a folder is needed"
        raise UserError("profile.path", config.path, why) from error
    except (OSError, ValueError, RuntimeError) as error:  # or a ~name of nobody
        raise UserError("profile.path", config.path, _unwritable(error)) from error
    if file.is_dir():
        why = f"has a folder named {FILE}, which is the trace's name; remove it"
        raise UserError("profile.path", config.path, why)


def trace_path(config: ProfileConfig) -> Path:
    """The file of the trace."""
    return Path(config.path or "").expanduser() / FILE


def engine_parts(
    model: BoundModel, transport: Transport, backend: Backend
) -> tuple[BoundModel, str | Backend]:
    """The model and the kernel for the engine of one rank: recorded if its transport is."""
    if not isinstance(transport, TracedTransport):
        return model, backend.name
    recorder = transport.recorder
    return TracedModel(**vars(model), recorder=recorder), traced_backend(backend, recorder)


@dataclass(frozen=True, slots=True)
class Written:
    """The file, and lines about it for people."""

    path: Path
    lines: list[str]


class Trace:
    """Records the ranks of this process from now on; `ranks` take the place of the given ones.

    Raises UserError if the file could not be written.
    """

    def __init__(self, config: ProfileConfig, ranks: Ranks):
        check_profile(config)
        self._config, self._inner = config, ranks
        self._recorders = {
            transport.rank: Recorder(clock_of(transport.device), config.max_events)
            for transport in ranks.transports
        }
        self.ranks = TracedRanks(ranks, list(self._recorders.values()))
        owners = list(self._recorders)
        self._begun = dict(zip(owners, ranks.run(measure_offset), strict=True))

    def hook(self, model: BoundModel) -> None:
        """Record the layers of a model that the ranks of this process share."""
        hook_layers(model)

    def finish(self, about: dict[str, Any]) -> Written | None:
        """Write the trace of all ranks; on other ranks than 0 None.

        Every rank makes this call.  UserError if the file cannot be written.
        """
        collected = self._inner.run(self._collect)[0]
        if collected is None:
            return None
        ranks = [_rank_trace(rank, part) for rank, part in enumerate(collected)]
        path = trace_path(self._config)
        content = trace_file(ranks, about)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            raise UserError("profile.path", self._config.path, _unwritable(error)) from error
        spans = sum(len(rank.record.spans) for rank in ranks)
        told = f"trace of {len(ranks)} ranks: {path}, {spans:,} events, for https://ui.perfetto.dev"
        return Written(path, [told, *summary_lines(ranks, self._config.max_events)])

    def _collect(self, transport: Transport) -> list[bytes] | None:
        """Every rank's part, on rank 0."""
        aligned = Alignment(self._begun[transport.rank], measure_offset(transport))
        record = self._recorders[transport.rank].record()
        return bytes_on_rank_0(transport, _packed(record, aligned, transport))


def _packed(record: RankRecord, aligned: Alignment, transport: Transport) -> bytes:
    """A record on rank 0's clock, as it travels."""
    spans = [
        (kind, name, phase, aligned.on_rank_0(began), aligned.on_rank_0(ended), details)
        for kind, name, phase, began, ended, details in record.spans
    ]
    totals = [(*key, asdict(total)) for key, total in record.totals.items()]
    where = f"{transport.name} {transport.device} {socket.gethostname()}:{os.getpid()}"
    part = {"spans": spans, "totals": totals, "dropped": record.dropped, "where": where}
    return zlib.compress(json.dumps(part).encode(), level=1)


def _rank_trace(rank: int, packed: bytes) -> RankTrace:
    part = json.loads(zlib.decompress(packed))
    totals = {(phase, kind): Total(**total) for phase, kind, total in part["totals"]}
    spans = [Span(*span) for span in part["spans"]]
    return RankTrace(rank, part["where"], RankRecord(spans, totals, part["dropped"]))


def _unwritable(error: Exception) -> str:
    return f"cannot be written: {reason(error)}"
