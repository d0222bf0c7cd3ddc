"""What stands for `past_key_values` when KV is sharded over ranks."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers import Cache


class ShardedPast(Cache):
    """The KV of a batch of texts as the ranks of this process hold it.

    transformers asks it only how many tokens there are: attention reads its KV elsewhere.
    `shards[rank]` has one entry for each text; `columns` counts tokens as transformers does, the
    padding of a batch among them.  `whole` is false while it is being extended, and stays so if
    that is interrupted.  `owner` is the attached model that made it.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shards: dict[int, list[Any]] = {}
        self.columns = 0
        self.whole = True
        self.owner: str | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest text, as every layer has them."""
        return self.columns

    def __len__(self) -> int:
        return self.columns

    def __repr__(self) -> str:
        return f"ShardedPast({self.columns} tokens, {self.nbytes:,} bytes in this process)"

    @property
    def nbytes(self) -> int:
        """Bytes of the KV that the ranks of this process hold."""
        return sum(shard.cache.nbytes for shards in self.shards.values() for shard in shards)

    def reset(self) -> None:
        """Forget everything."""
        self.shards, self.columns, self.whole = {}, 0, True

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            "KV that is sharded over ranks cannot be cut, reordered or repeated"
            " (beam search and assisted decoding do that)"
        )

    update = crop = reorder_cache = _refuse
    batch_repeat_interleave = batch_select_indices = _refuse
