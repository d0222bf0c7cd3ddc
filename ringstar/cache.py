"""The KV that one rank owns, layer by layer.

B batch, T tokens, K key/value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from localflash import DenseKV
from seqpar import Run, Runs, token_count


class ShardedCache:
    """This rank's KV in memory order, and the positions that it stands for.

    Tokens are reserved with their positions (`append`), written layer by layer as a forward
    pass reaches each (`write`), and may be given back from the end (`truncate`).  Storage is
    (B, T, K, D), so that any range of tokens is one contiguous piece that can be sent as it is.
    """

    def __init__(self) -> None:
        self.runs: Runs = ()
        self.tokens = 0
        self._capacity = 0
        self._layers: dict[int, DenseKV] = {}

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all, so that appending up to there moves nothing."""
        self._capacity = max(self._capacity, tokens)

    def append(self, runs: Runs) -> int:
        """Reserve the positions `runs`; returns the index where they will be written."""
        at = self.tokens
        for run in runs:
            self.runs = _joined(self.runs, run)
        self.tokens += token_count(runs)
        self.reserve(self.tokens)
        return at

    def truncate(self, runs: Runs) -> None:
        """Go back to an earlier state, whose `runs` were a beginning of the present ones."""
        self.runs, self.tokens = runs, token_count(runs)

    def write(self, layer: int, at: int, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        """Store the KV of the tokens from index `at` on."""
        stop = at + k_BTKD.shape[1]
        room = self._room(layer, k_BTKD, v_BTKD)
        room.k_BTHD[:, at:stop].copy_(k_BTKD)
        room.v_BTHD[:, at:stop].copy_(v_BTKD)

    def view(self, layer: int, start: int, stop: int) -> DenseKV:
        """Tokens [start, stop) of `layer`, without a copy."""
        return self._layers[layer].slice(start, stop)

    @property
    def nbytes(self) -> int:
        """Bytes of the KV that is held."""
        return sum(kv.slice(0, self.tokens).nbytes for kv in self._layers.values())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the storage, room for growth included."""
        return sum(kv.nbytes for kv in self._layers.values())

    def _room(self, layer: int, k: Tensor, v: Tensor) -> DenseKV:
        old = self._layers.get(layer)
        if old is not None and old.tokens >= self._capacity:
            return old
        new = DenseKV(*(_empty(tensor, self._capacity) for tensor in (k, v)))
        if old is not None:  # one layer at a time: growth needs one layer's worth of memory
            new.k_BTHD[:, : old.tokens].copy_(old.k_BTHD)
            new.v_BTHD[:, : old.tokens].copy_(old.v_BTHD)
        self._layers[layer] = new
        return new


def _empty(like: Tensor, tokens: int) -> Tensor:
    batch, _, heads, dim = like.shape
    return torch.empty(batch, tokens, heads, dim, dtype=like.dtype, device=like.device)


def _joined(runs: Runs, run: Run) -> Runs:
    """`runs` and then `run`, as one run where the spacing goes on: lists stay short."""
    if not runs:
        return (run,)
    last = runs[-1]
    gap = run.start - last.last
    step = last.step if len(last) > 1 else gap
    even = gap == step > 0 and (len(run) == 1 or run.step == step)
    return (*runs[:-1], Run(last.start, run.last + 1, step)) if even else (*runs, run)
