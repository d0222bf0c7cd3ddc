"""Documents of a LongContext on disk: saved, loaded, and encoded part by part."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringstar.checks import check_fits
from ringstar.config import (
    RingConfig,
    StarConfig,
    StrategyConfig,
    saved_strategy,
    strategy_settings,
)
from ringstar.document import Document
from ringstar.engine import OnProgress
from ringstar.errors import UserError
from ringstar.group import check_held
from ringstar.metrics import gather_metrics, slowest
from ringstar.room import make_room
from ringstar.shard import TextShard
from ringstar.store import (
    Claim,
    Manifest,
    check_saved,
    dealt,
    is_saved,
    move_saved,
    read_ids,
    read_manifest,
    read_shard,
    remove_saved,
    saved_needs,
    unfinished_place,
    write_shards,
)
from seqpar import Transport

if TYPE_CHECKING:
    from ringstar.runtime import LongContext


def save(runtime: LongContext, document: Document, folder: str) -> None:
    """`LongContext.save`."""
    check_held(document, runtime)
    with alone(runtime, folder, wait=True):
        write(runtime, document, folder, None)
    runtime.group.say(f"document of {document.tokens:,} tokens saved to {folder}")


@contextmanager
def alone(runtime: LongContext, folder: str, *, wait: bool) -> Iterator[None]:
    """No other run writes to this folder meanwhile; else UserError, or it is waited for."""
    claim = Claim(Path(folder).expanduser())
    try:
        wrong = runtime.group.run(lambda transport: claim.take(transport, wait=wait))[0]
        if wrong is not None:
            raise UserError("document.save", folder, wrong)
        yield
    finally:
        claim.give_back()


def write(runtime: LongContext, document: Document, folder: str, before: Manifest | None) -> None:
    """Write what comes after `before`, which is what the folder has."""
    check_held(document, runtime)
    facts = {**identity(runtime), "strategy": strategy_settings(document.strategy)}
    path = Path(folder).expanduser()

    def write(transport: Transport) -> str | None:
        _, shard, _ = runtime.group.at_hand(transport, document, "save")
        return write_shards(transport, shard, document.ids, path, facts, before)

    wrong = runtime.group.run(write)[0]
    if wrong is not None:
        raise UserError("document.save", folder, wrong)


def load(runtime: LongContext, folder: str, key: str = "document.load") -> Document:
    """`LongContext.load`; `key` is the option that names the folder."""
    group = runtime.group
    path, manifest = read_manifest(key, folder)
    chosen = _check_identity(runtime, key, folder, manifest)
    strategy = runtime.config.strategy
    layout: Any = strategy.layout if isinstance(strategy, RingConfig) else "zigzag"

    def load(transport: Transport) -> tuple[TextShard | None, Any, str | None]:
        transport.publish("load document")
        transport.check_agreement("document", manifest)
        started = time.perf_counter()
        wrong = check_saved(transport, path, manifest)
        if wrong is not None:
            return None, None, wrong
        engine, owned = group.engines[transport.rank], dealt(manifest, layout, transport)
        shard = engine.new_text(manifest.length)
        needs = saved_needs(shard, manifest, owned[transport.rank])
        make_room(transport, engine.pool, needs, group.victims(transport))
        room = engine.room_beside(needs, [shard])
        wrong = read_shard(transport, path, manifest, owned, shard, room)
        took_s = slowest(transport, time.perf_counter() - started)
        return shard, (gather_metrics(transport, shard.cache.nbytes, 0), took_s), wrong

    shards, (figures, *_), (wrong, *_) = zip(*group.run(load), strict=True)
    if wrong is not None:
        raise UserError(key, folder, wrong)
    metrics, took_s = figures
    ids = read_ids(path, manifest)
    saved_by = ", ".join(str(n) for n in sorted({len(p.files) for p in manifest.parts}))
    group.say(
        f"document of {len(ids):,} tokens loaded from {folder}: encoded by {chosen.name} over"
        f" {saved_by} ranks, dealt to {runtime.world_size}"
    )
    by = len(manifest.parts[0].files)
    document = Document(ids, chosen, took_s, metrics, list(shards), runtime, by)
    group.shelf.add(document)
    return document


def encode_kept(
    runtime: LongContext,
    ids: list[int],
    folder: str,
    checkpoint_every: int,
    on_progress: OnProgress | None,
    length: int,
) -> Document:
    """`LongContext.encode_kept`, of token ids that fit; the unfinished folder is ours `alone`."""
    unfinished = unfinished_place(folder)
    length = max(length, len(ids))
    made = _unfinished(runtime, unfinished, ids, length)
    seconds, sent = 0.0, [0] * runtime.world_size
    piece = checkpoint_every * runtime.config.encode.chunk_tokens * runtime.world_size
    done = made.tokens if made else 0
    for start in range(done, len(ids), piece):
        part = ids[start : start + piece]
        report = _part_of(on_progress, start, len(part), len(ids))
        if made is None:
            made = runtime.encode(part, report, length=length)
            before = None
        else:
            before = read_manifest("document.save", unfinished)[1]
            made = runtime.append(made, part, report)
        seconds += made.encode_s
        sent = [sum(pair) for pair in zip(sent, made.metrics.bytes_sent, strict=True)]
        write(runtime, made, unfinished, before)
    assert made is not None
    _take_over(runtime, made, unfinished, folder)
    whole = replace(made, encode_s=seconds, metrics=replace(made.metrics, bytes_sent=sent))
    runtime.shelf.remove(made)  # or a question would make room by what it is about
    runtime.shelf.add(whole)
    return whole


def _unfinished(
    runtime: LongContext, folder: str, ids: Sequence[int], length: int
) -> Document | None:
    """The beginning of a document that an earlier run encoded, if there is one."""
    if not is_saved(folder):
        return None
    found = load(runtime, folder, "document.save")
    if not runtime.group.any_engine.same_rope(found.shards[0].length, length):
        why = (
            "holds the beginning for a text of another length, on which this model's rotary"
            f" embedding depends: {found.shards[0].length}, here {length}; remove it, or save"
            " elsewhere"
        )
        raise UserError("document.save", folder, why)
    if found.ids != ids[: found.tokens] or isinstance(found.strategy, StarConfig):
        why = "holds the beginning of another document; remove it, or save elsewhere"
        raise UserError("document.save", folder, why)
    runtime.group.say(f"{found.tokens:,} of {len(ids):,} tokens are encoded already")
    return found


def _take_over(runtime: LongContext, document: Document, unfinished: str, folder: str) -> None:
    """The unfinished folder becomes the finished one, in one step if nothing is there yet."""
    group = runtime.group

    def rename(transport: Transport) -> bool:
        return move_saved(transport, Path(unfinished).expanduser(), Path(folder).expanduser())

    if group.run(rename)[0]:
        group.say(f"document of {document.tokens:,} tokens saved to {folder}")
        return
    runtime.save(document, folder)
    group.run(lambda transport: remove_saved(transport, Path(unfinished).expanduser()))


def _part_of(report: OnProgress | None, done: int, tokens: int, total: int) -> OnProgress | None:
    """Progress over a whole document, from that over one part of it."""
    if report is None:
        return None
    return lambda share: report((done + share * tokens) / total)


def identity(runtime: LongContext) -> dict[str, str]:
    """What KV depends on, beside the tokens and the strategy."""
    model, scaling = runtime.group.any_engine.model, runtime.files.scaling
    scaled = f", {scaling[0]} by {scaling[1]:g}" if scaling else ""
    return {
        "model": runtime.files.config.model_type,
        "fingerprint": runtime.fingerprint,
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "rope": model.rotary.precision + scaled,
        "kv": runtime.config.cache.dtype,
    }


def _check_identity(
    runtime: LongContext, key: str, folder: str, manifest: Manifest
) -> StrategyConfig:
    """How a saved document was encoded; UserError if this model would not have."""
    ours = identity(runtime)
    for name in ("model", "dtype", "rope", "kv", "fingerprint"):
        theirs, own = str(getattr(manifest, name)), ours[name]
        if theirs != own:
            names = {"fingerprint": "model (weights or config)", "kv": "cache.dtype"}
            what = names.get(name, name)
            why = f"was encoded with another {what}: {theirs[:16]}, here {own[:16]}"
            raise UserError(key, folder, why)
    chosen = saved_strategy(key, folder, manifest.strategy)
    check_fits(replace(runtime.config, strategy=RingConfig()), runtime.files, 1, manifest.tokens)
    return chosen
