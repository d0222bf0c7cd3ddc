"""Plain Hugging Face on one device: what every answer of ours is compared with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ringstar.models.load import ModelFiles, load_weights


@dataclass(frozen=True, slots=True)
class PlainAnswer:
    """Greedy tokens without the end token, the first one's logits (vocab,), and seconds."""

    ids: list[int]
    first_logits: Tensor
    ttft_s: float
    tpot_s: float


def plain_model(files: ModelFiles, dtype: torch.dtype, device: torch.device, attention: str) -> Any:
    """An unmodified model with transformers' own `attention`, on `device`."""
    # the experts' fused form has no float64
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = load_weights(files, device, dtype=dtype, attn_implementation=attention, **experts)
    return model if files.quantised else model.to(device)


class OneDevice:
    """An unmodified model with transformers' own attention and cache."""

    def __init__(
        self,
        files: ModelFiles,
        dtype: torch.dtype,
        device: torch.device,
        attention: str = "sdpa",
    ):
        self._model = plain_model(files, dtype, device, attention)
        self._ends = files.end_tokens()
        self._cache = DynamicCache()
        self._context_tokens = 0

    @torch.inference_mode()
    def encode(self, context_ids: Sequence[int]) -> float:
        """Prefill the document; returns the seconds that it took."""
        started = time.perf_counter()
        self._cache, self._context_tokens = DynamicCache(), len(context_ids)
        logits = self._forward(context_ids)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        return time.perf_counter() - started

    @torch.inference_mode()
    def ask(self, query_ids: Sequence[int], max_new_tokens: int) -> PlainAnswer:
        """Answer greedily; the document stays as it was."""
        started = time.perf_counter()
        first_logits = self._forward(query_ids)
        ids: list[int] = []
        token = int(first_logits.argmax())  # which waits for a GPU
        times = [time.perf_counter()]
        while token not in self._ends:
            ids.append(token)
            if len(ids) == max_new_tokens:
                break
            token = int(self._forward([token]).argmax())
            times.append(time.perf_counter())
        self._cache.crop(self._context_tokens - self._cache.get_seq_length())  # so many back
        tpot_s = (times[-1] - times[0]) / max(1, len(times) - 1)
        return PlainAnswer(ids, first_logits.cpu(), times[0] - started, tpot_s)

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int], rows: int = 512) -> Tensor:
        """Of each of `ids` but the first: float64 (len(ids) − 1,), on the CPU.

        `rows` tokens are read at once behind the cache, so that logits never exist for all.
        """
        cache, found = DynamicCache(), []
        text = torch.tensor([list(ids)], device=self._model.device)
        for start in range(0, len(ids) - 1, rows):
            read, wanted = text[:, start : start + rows], text[0, start + 1 : start + rows + 1]
            logits_TV = self._model(read, past_key_values=cache, use_cache=True).logits[0]
            chances_TV = logits_TV[: len(wanted)].double().log_softmax(-1)
            found.append(chances_TV.gather(1, wanted.unsqueeze(1)).squeeze(1).cpu())
        return torch.cat(found)

    def _forward(self, ids: Sequence[int]) -> Tensor:
        output = self._model(
            torch.tensor([list(ids)], device=self._model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[0, -1].float()
