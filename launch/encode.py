"""The document of a command: loaded, or encoded; and saved."""

from __future__ import annotations

from launch.inputs import Request
from launch.progress import encode_bar
from ringstar.config import Config
from ringstar.runtime import Document, LongContext


def encoded_document(config: Config, runtime: LongContext, request: Request) -> Document:
    """Loaded, or encoded with a progress bar; and saved, if it shall be."""
    ids, given = request.context_ids, config.document
    if given.load is not None:
        document = runtime.load(given.load)
    else:
        with encode_bar(len(ids), shown=runtime.rank == 0) as on_progress:
            length = len(ids) + len(request.query_ids)
            if given.save is not None and given.checkpoint_every is not None:
                kept = (given.save, given.checkpoint_every)
                return runtime.encode_kept(ids, *kept, on_progress, length=length)
            document = runtime.encode(ids, on_progress, length=length)
    if given.save is not None:
        runtime.save(document, given.save)
    return document
