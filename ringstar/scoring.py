"""How likely continuations of a document are, as a LongContext scores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ringstar.checks import Text, check_fits, token_ids
from ringstar.document import Document
from ringstar.engine import OnProgress
from ringstar.errors import UserError
from ringstar.group import check_held
from ringstar.scores import Score, score_of
from seqpar import Transport

if TYPE_CHECKING:
    from ringstar.runtime import LongContext


def score(
    runtime: LongContext,
    document: Document | Text,
    continuations: Sequence[Text],
    after: Text,
    on_progress: OnProgress | None,
) -> list[Score]:
    """`LongContext.score`."""
    if isinstance(continuations, str):
        raise UserError("continuations", continuations, "needed is a list of texts or of ids")
    ids = [_following_ids(runtime, "continuation", each) for each in continuations]
    before = _following_ids(runtime, "after", after) if len(after) else []
    if not isinstance(document, Document):
        document, before = _encode_before(runtime, document, before, ids, on_progress)
    check_held(document, runtime)
    runtime.group.shelf.use(document)
    again = 0 if before else 1
    before = before or [document.ids[-1]]
    _check_continuations(runtime, document, len(before) - again, ids)

    def score(transport: Transport) -> list[torch.Tensor]:
        engine, shard, victims = runtime.group.at_hand(transport, document, "score")
        return [engine.score(shard, before, each, again, victims) for each in ids]

    return [score_of(*pair) for pair in zip(ids, runtime.group.run(score)[0], strict=True)]


def _following_ids(runtime: LongContext, key: str, given: Text) -> list[int]:
    """Token ids of what follows a document; also of spaces alone."""
    files = runtime.files
    ids = files.more_ids(given) if isinstance(given, str) else given
    return token_ids(key, ids, files.more_ids, files.vocab_size)


def _encode_before(
    runtime: LongContext,
    text: Text,
    after: list[int],
    continuations: list[list[int]],
    report: OnProgress | None,
) -> tuple[Document, list[int]]:
    """A text, encoded but for its last token, which is read with what comes after it."""
    files = runtime.files
    ids = token_ids("document", text, files.plain_ids, files.vocab_size)
    read = [max(0, len(each) - 1) for each in continuations] or [0]
    length = runtime.check_lengths([len(ids) + len(after) + tokens for tokens in read])
    head, after = (ids[:-1], [ids[-1], *after]) if len(ids) > 1 else (ids, after)
    check_fits(runtime.config, files, runtime.world_size, len(head), length - len(head))
    return runtime.encode(head, report, length=length), after


def _check_continuations(
    runtime: LongContext, document: Document, before: int, continuations: list[list[int]]
) -> None:
    for ids in continuations:
        runtime.check_question(document, before + len(ids) - 1)
    window = runtime.files.window
    if not before and window is not None and window <= document.tokens:
        why = f"layers with a window of {window} have forgotten what its last token saw;"
        why += " allowed: a text or ids in its place, or something after it"
        raise UserError("document", f"{document.tokens} tokens", why)
