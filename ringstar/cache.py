"""The KV that one rank owns, layer by layer.

B batch, T tokens, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from localflash import DenseKV
from seqpar import Runs, clip, joined, token_count

State = dict[int | None, Runs]


class ShardedCache:
    """The KV that this rank owns, for each window that layers have.

    A layer with a sliding window needs only what the window still shows, so that its list of
    positions is not that of others.  Which windows there are is known once every layer has run:
    in the first pass.
    """

    def __init__(self) -> None:
        self._by_window: dict[int | None, KeptKV] = {}
        self._first: Runs = ()
        self._passes = 0
        self._room = 0

    def append(self, runs: Runs) -> None:
        """Reserve the positions `runs` in every layer, for the pass that begins."""
        for kept in self._by_window.values():
            kept.append(runs)
        self._first = runs
        self._passes += 1

    def of(self, window: int | None) -> KeptKV:
        """What layers with this window hold."""
        if window not in self._by_window:
            if self._passes != 1:
                raise RuntimeError(f"layers with a window of {window} came after the first pass")
            kept = self._by_window[window] = KeptKV()
            kept.reserve(self._room if window is None else 0)
            kept.append(self._first)
        return self._by_window[window]

    def reserve(self, tokens: int) -> None:
        """Room for so many tokens in layers without a window: appending them moves nothing."""
        self._room = tokens
        if None in self._by_window:
            self._by_window[None].reserve(tokens)

    def make_room(self, tokens: int) -> None:
        """Room for so many tokens more in every layer."""
        for kept in self._by_window.values():
            kept.reserve(kept.tokens + tokens)

    def make_way(self, position: int, tokens: int, ahead: int) -> None:
        """Room for so many tokens more, of which the first is at `position` or later.

        Where there is none, what windows no longer show is dropped, and there will be room for
        `ahead` more: a text that grows token by token is moved now and then.
        """
        for window, kept in self._by_window.items():
            if window is not None and kept.lacks(tokens):
                kept.drop_before(position - window + 1)
            if kept.lacks(tokens):
                kept.reserve(kept.tokens + tokens + ahead)

    def forget(self, position: int) -> None:
        """Drop what no query at `position` or later will see."""
        for window, kept in self._by_window.items():
            if window is not None:
                kept.drop_before(position - window + 1)

    def fit(self, room: int) -> None:
        """Give back memory that windows no longer need, but for `room` tokens."""
        for window, kept in self._by_window.items():
            if window is not None:
                kept.fit(room)

    @property
    def layers(self) -> dict[int | None, tuple[int, ...]]:
        """The layers of each window."""
        return {window: kept.layers for window, kept in self._by_window.items()}

    def all_layers(self) -> Iterator[tuple[int | None, int, DenseKV]]:
        """The window and the KV of every layer, without a copy."""
        for window, kept in self._by_window.items():
            for layer in kept.layers:
                yield window, layer, kept.view(layer, 0, kept.tokens)

    def restore(self, window: int | None, runs: Runs, room: int) -> KeptKV:
        """Layers with this window, for KV at `runs` that is about to be written, and some more."""
        kept = self._by_window[window] = KeptKV()
        kept.append(runs)
        kept.reserve(max(self._room if window is None else 0, kept.tokens + room))
        self._passes = 1
        return kept

    @property
    def state(self) -> State:
        """What `truncate` goes back to."""
        return {window: kept.runs for window, kept in self._by_window.items()}

    def truncate(self, state: State) -> None:
        """Forget what was appended since."""
        for window, kept in self._by_window.items():
            kept.truncate(state.get(window, ()))  # a rank that kept nothing may have run nothing

    @property
    def nbytes(self) -> int:
        """Bytes of the KV that is held."""
        return sum(kept.nbytes for kept in self._by_window.values())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the storage, room for growth included."""
        return sum(kept.allocated_nbytes for kept in self._by_window.values())


class KeptKV:
    """KV in memory order, and the positions that it stands for, in layers of one kind.

    Tokens are reserved with their positions (`append`), written layer by layer as a forward
    pass reaches each (`write`), and may be given back from either end (`truncate`,
    `drop_before`).  Storage is (B, T, K, D), so that any range of tokens is one contiguous piece
    that can be sent as it is.
    """

    def __init__(self) -> None:
        self.runs: Runs = ()
        self.tokens = 0
        self.at = 0  # where the tokens of the last `append` begin
        self._capacity = 0
        self._layers: dict[int, DenseKV] = {}

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all, so that appending up to there moves nothing."""
        self._capacity = max(self._capacity, tokens)

    def lacks(self, tokens: int) -> bool:
        """Whether there is no room for so many more."""
        return self.tokens + tokens > self._capacity

    def append(self, runs: Runs) -> int:
        """Reserve the positions `runs`; returns the index where they will be written."""
        self.at = self.tokens
        for run in runs:
            self.runs = joined(self.runs, run)
        self.tokens += token_count(runs)
        self.reserve(self.tokens)
        return self.at

    def truncate(self, runs: Runs) -> None:
        """Go back to an earlier state, whose `runs` were a beginning of the present ones."""
        self.runs, self.tokens = runs, token_count(runs)

    def write(self, layer: int, at: int, k_BTKD: Tensor, v_BTKD: Tensor) -> None:
        """Store the KV of the tokens from index `at` on."""
        stop = at + k_BTKD.shape[1]
        room = self._room(layer, k_BTKD, v_BTKD)
        room.k_BTHD[:, at:stop].copy_(k_BTKD)
        room.v_BTHD[:, at:stop].copy_(v_BTKD)

    def drop_before(self, position: int) -> None:
        """Forget all positions before; the others keep their order, from index 0 on."""
        kept, self.runs, self.tokens = _from(self.runs, position), clip(self.runs, position), 0
        for source in kept:
            to = slice(self.tokens, self.tokens + source.stop - source.start)
            for kv in self._layers.values() if to != source else ():
                for tensor in (kv.k_BTHD, kv.v_BTHD):
                    tensor[:, to].copy_(tensor[:, source].clone())  # the two may overlap
            self.tokens = to.stop

    def fit(self, room: int) -> None:
        """Storage for the tokens that are here and `room` more."""
        self._capacity = self.tokens + room
        for layer, kv in self._layers.items():
            if kv.tokens > self._capacity:
                self._layers[layer] = DenseKV(
                    *(
                        tensor[:, : self._capacity].clone(memory_format=torch.contiguous_format)
                        for tensor in (kv.k_BTHD, kv.v_BTHD)
                    )
                )

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(self._layers))

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


def _from(runs: Runs, position: int) -> list[slice]:
    """Where, in memory order, the positions from `position` on are: the end of each run."""
    found, at = [], 0
    for run in runs:
        gone = min(len(run), max(0, -(-(position - run.start) // run.step)))
        if gone < len(run):
            found.append(slice(at + gone, at + len(run)))
        at += len(run)
    return found


def _empty(like: Tensor, tokens: int) -> Tensor:
    batch, _, heads, dim = like.shape
    return torch.empty(batch, tokens, heads, dim, dtype=like.dtype, device=like.device)
