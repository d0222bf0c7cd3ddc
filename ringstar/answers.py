"""From generated tokens to an answer: ends, stop texts, streamed text, timings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ringstar.config import GenerationConfig
from ringstar.engine import GeneratedToken
from ringstar.metrics import RankMetrics

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Answer:
    """An answer and what it took.

    `ttft_s` is from the request to the first token (encoding not included), `tpot_s` the mean
    time of each further one (0 if there was none), `latency_s` that of the whole; seconds.
    `ids` hold no end token.
    `token_s` are the seconds from the request to each token, an end token's too.
    `first_logits (vocab,)` is float32: what the first token was chosen from.
    """

    text: str
    ids: list[int]
    query_tokens: int
    finish_reason: FinishReason
    ttft_s: float
    tpot_s: float
    latency_s: float
    token_s: list[float]
    first_logits: Tensor
    metrics: RankMetrics


@dataclass(frozen=True, slots=True)
class Generated:
    """The tokens of one answer, and when they came."""

    ids: list[int]
    text: str
    finish_reason: FinishReason
    times_s: list[float]
    first_logits: Tensor


def collect(
    steps: Iterable[GeneratedToken],
    settings: GenerationConfig,
    end_tokens: frozenset[int],
    tokenizer: Any | None,
    on_text: Callable[[str], None] | None,
    until: Callable[[str], bool] | None = None,
) -> Generated:
    """Take tokens until an end token, a stop text, `max_new_tokens`, or `until` is true.

    Every rank sees the same tokens and so stops at the same one.  `on_text` receives pieces
    of the answer as soon as they are certain; `until` is asked about all of it so far.
    """
    ids: list[int] = []
    times: list[float] = []
    reason: FinishReason = "length"
    first_logits: Tensor | None = None
    text = TextStream(tokenizer, settings.stop, on_text)
    for step in steps:
        times.append(step.at_s)
        first_logits = first_logits if step.first_logits is None else step.first_logits
        if step.token in end_tokens and not settings.ignore_eos:
            reason = "stop"
            break
        ids.append(step.token)
        if text.add(step.token) or (until is not None and until(text.so_far)):
            reason = "stop"
            break
        if len(ids) >= settings.max_new_tokens:
            break
    assert first_logits is not None
    return Generated(ids, text.finish(), reason, times, first_logits.cpu())


class TextStream:
    """Decodes tokens as they come, and holds back what may still change.

    Held back: an unfinished character, and the beginning of a stop text.  Each token is decoded
    together with the few before it that it may join, never with the whole answer.
    """

    def __init__(
        self, tokenizer: Any | None, stops: Sequence[str], on_text: Callable[[str], None] | None
    ):
        self._tokenizer, self._stops, self._on_text = tokenizer, list(stops), on_text
        self._ids: list[int] = []
        self._context, self._decoded = 0, 0  # where to decode from; how far text is certain
        self._text, self._shown = "", 0

    @property
    def so_far(self) -> str:
        """What is certain of the text."""
        return self._text

    def add(self, token: int) -> bool:
        """Take one token; True when a stop text has appeared."""
        if self._tokenizer is None:
            return False
        self._ids.append(token)
        piece = self._next_piece()
        if piece.endswith("\ufffd"):
            return False
        if not piece and self._is_hidden(token):
            self._ids.pop()  # standing first, it would take the space of what follows
            return False
        self._context, self._decoded = self._decoded, len(self._ids)
        return self._take(piece)

    def finish(self) -> str:
        """The whole text; shows what was held back."""
        if self._tokenizer is not None and self._decoded < len(self._ids):
            piece = self._next_piece()
            self._decoded = len(self._ids)
            self._take(piece)
        self._show(len(self._text))
        return self._text

    def _is_hidden(self, token: int) -> bool:
        """Whether it is special: text that is never shown."""
        assert self._tokenizer is not None
        return not self._decode([token]) and bool(self._tokenizer.decode([token]))

    def _next_piece(self) -> str:
        """The text of the tokens that are not certain yet."""
        certain = self._decode(self._ids[self._context : self._decoded])
        return self._decode(self._ids[self._context :])[len(certain) :]

    def _take(self, piece: str) -> bool:
        longest = max((len(stop) for stop in self._stops), default=0)
        search_from = max(0, len(self._text) - longest)
        self._text += piece
        found = [at for s in self._stops if (at := self._text.find(s, search_from)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self._decoded = len(self._ids)
            return True
        self._show(len(self._text) - self._possible_stop())
        return False

    def _decode(self, ids: list[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _show(self, stop: int) -> None:
        if self._on_text is not None and stop > self._shown:
            self._on_text(self._text[self._shown : stop])
            self._shown = stop

    def _possible_stop(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stops):
                return size
        return 0
