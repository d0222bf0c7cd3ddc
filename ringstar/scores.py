"""How likely the model held each token of a text to be.

T tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ringstar.models import BoundModel
from seqpar import Part, Runs, Transport, positions, token_count

# of logits that exist at once: all of a long text's would be larger than the model
_LOGITS_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class Score:
    """Tokens, and what the model held each of them to be, given all before it.

    `logprobs (T,)` are natural logarithms of their probabilities, float32; `greedy (T,)` tells
    which of them were the model's first choice.  Both are on the CPU.
    """

    ids: list[int] = field(repr=False)
    logprobs: Tensor = field(repr=False)
    greedy: Tensor = field(repr=False)

    @property
    def logprob(self) -> float:
        """Of all tokens together: the sum, in float64."""
        return float(self.logprobs.double().sum())

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have written just these tokens."""
        return bool(self.greedy.all())

    @property
    def perplexity(self) -> float:
        """exp(−mean log-probability): among how many tokens the model chose, as it were."""
        return perplexity(self.logprobs)

    def perplexities(self, parts: int) -> list[tuple[int, float]]:
        """That of each of `parts` neighbouring pieces of about equal length, for a curve.

        Each with the number of tokens up to its end; fewer pieces if there are fewer tokens.
        """
        pieces = self.logprobs.tensor_split(min(parts, len(self.ids)))
        ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()
        return [(end, perplexity(piece)) for end, piece in zip(ends, pieces, strict=True)]


def perplexity(logprobs_T: Tensor) -> float:
    """exp(−mean) of log-probabilities, the mean in float64; infinite beyond float64."""
    mean = -float(logprobs_T.double().mean())
    return math.exp(mean) if mean < 709 else math.inf


def next_token_scores(model: BoundModel, hidden_TC: Tensor, next_ids_T: Tensor) -> Tensor:
    """Rows (2, T) float32: log-probabilities of the tokens that come next, and 1 where greedy.

    `hidden_TC` are what the layers made of the tokens before; logits are made slice by slice.
    """
    rows = max(1, _LOGITS_BYTES // (4 * model.config.vocab_size))
    found = hidden_TC.new_empty(2, len(hidden_TC), dtype=torch.float32)
    for start in range(0, len(hidden_TC), rows):
        part = slice(start, start + rows)
        logits_TV, wanted_T = model.head(hidden_TC[part]), next_ids_T[part]
        chosen_T = logits_TV.gather(1, wanted_T.unsqueeze(1)).squeeze(1)
        found[0, part] = chosen_T - logits_TV.logsumexp(1)
        found[1, part] = logits_TV.argmax(1) == wanted_T
    return found


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A text whose tokens from index `start` on are scored, which is 1 or later.

    Its first token has nothing before it, and its last is not read.
    """

    ids: list[int]
    start: int

    @property
    def read(self) -> list[int]:
        return self.ids[:-1]

    @property
    def scored(self) -> list[int]:
        return self.ids[self.start :]


class SpreadScores:
    """Scores of whole texts while they are encoded, each rank's after the tokens it computes."""

    def __init__(self, model: BoundModel, texts: Sequence[ScoredText]):
        self._model, self._texts = model, texts
        self._rows: list[list[Tensor]] = [[] for _ in texts]

    def add(self, parts: Sequence[Part], hidden_TC: Tensor) -> None:
        """Take what one pass made of `parts`, side by side; of each, what is kept comes last."""
        stop = 0
        for part in parts:
            stop += token_count(part.positions)
            text, own_T = self._texts[part.text], _positions(part.kept)
            before_T = own_T >= text.start - 1
            rows_T = (stop - len(own_T) + before_T.nonzero().flatten()).to(hidden_TC.device)
            wanted_T = rows_T.new_tensor([text.ids[at + 1] for at in own_T[before_T].tolist()])
            found = next_token_scores(self._model, hidden_TC[rows_T], wanted_T)
            self._rows[part.text].append(found)

    def gathered(self, transport: Transport, owned: Sequence[Sequence[Runs]]) -> list[Score]:
        """All of every text, on every rank; `owned[i][r]` is what rank r computed of text i."""
        texts = zip(self._texts, self._rows, owned, strict=True)
        return [_gathered(transport, text, rows, runs) for text, rows, runs in texts]


def _gathered(
    transport: Transport, text: ScoredText, rows: Sequence[Tensor], owned: Sequence[Runs]
) -> Score:
    mine = torch.cat(
        [torch.empty(2, 0, dtype=torch.float32, device=transport.device), *rows], 1
    )  # there may be none
    places = [own_T[own_T >= 0] for own_T in (_positions(o) + 1 - text.start for o in owned)]
    room = mine.new_zeros(2, max(map(len, places)))
    room[:, : mine.shape[1]] = mine
    everyone = room.new_empty(transport.world_size, *room.shape)
    transport.all_gather(room, everyone).wait()
    whole = mine.new_empty(2, len(text.scored), device="cpu")
    for own_T, theirs in zip(places, everyone.cpu(), strict=True):
        whole[:, own_T] = theirs[:, : len(own_T)]
    return score_of(text.scored, whole)


def _positions(runs: Runs) -> Tensor:
    return torch.tensor(positions(runs), dtype=torch.int64)


def score_of(ids: Sequence[int], found: Tensor) -> Score:
    """From rows (2, T) as `next_token_scores` gives them; RuntimeError if they are no numbers."""
    logprobs_T, greedy_T = found.cpu()
    if not logprobs_T.isfinite().all():
        raise RuntimeError("the model gave logits that are not finite")
    return Score(list(ids), logprobs_T.clone(), greedy_T > 0)
