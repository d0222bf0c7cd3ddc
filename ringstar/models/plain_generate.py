"""Hugging Face's own generation on one device, step by step: `generate` and `generate_batch`.

Both give exactly as many greedy tokens as they are asked for: end tokens end nothing.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import BaseStreamer, ContinuousBatchingConfig

from ringstar.models.load import ModelFiles
from ringstar.models.modeling import auto_model
from ringstar.models.one_device import plain_model
from ringstar.timed import Timed

# transformers' own sizes: tokens of KV in a page, and tokens that one pass reads at most
PAGE_TOKENS = 256
PASS_TOKENS = 8192


class _Clock(BaseStreamer):
    """Hears of each step's tokens when they are in host memory, the prompt before them."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(value)

    def end(self) -> None:
        pass


class PlainGenerate:
    """`model.generate` of a loaded model: with transformers' own attention and cache, or ours."""

    def __init__(self, model: Any):
        self._model = model
        # a checkpoint's own settings may sample, and end at tokens
        self._model.generation_config = _greedy()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timed:
        """Greedy tokens to prompts of one length, which are the rows of one batch."""
        clock, asked_s = _Clock(), time.perf_counter()
        ids_BT = torch.tensor([list(prompt) for prompt in prompts], device=self._model.device)
        self._model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=new_tokens,
            streamer=clock,
        )
        ids = torch.stack(clock.tokens[1:], dim=1).tolist()
        return Timed(asked_s, [clock.times[1:] for _ in prompts], ids)


class BatchGenerate:
    """Continuous batching (`generate_batch`) with `sdpa` and a paged cache.

    Every call has a manager and a cache of its own, made before it counts as asked, with room for
    `batch` texts of `tokens` tokens and no more: by default it would take most of the memory.
    Prompts that begin alike share nothing, as nowhere else here.
    """

    def __init__(
        self,
        files: ModelFiles,
        dtype: torch.dtype,
        device: torch.device,
        *,
        batch: int,
        tokens: int,
    ):
        self._model = plain_model(files, dtype, device, "sdpa")
        self._config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=batch_blocks(batch, tokens),
            max_batch_tokens=min(PASS_TOKENS, batch * tokens),
            max_requests_per_batch=batch,
            allow_block_sharing=False,
            safety_margin=0.0,  # there is room for all: none has to wait for another
            auto_switch_to_flash=False,  # it would fetch kernels from the hub
        )

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timed:
        """Greedy tokens to prompts, which arrive together; raises RuntimeError if one fails."""
        manager = self._model.init_continuous_batching(_greedy(eos_token_id=-1), self._config)
        manager.warmup()  # makes the cache
        try:
            asked_s = time.perf_counter()
            names = manager.add_requests(
                [list(prompt) for prompt in prompts],
                max_new_tokens=new_tokens,
                record_timestamps=True,
            )
            manager.start()  # not before: the first prompt would run alone
            done = _results(manager, len(names))
        finally:
            manager.stop(block=True)
            manager.destroy()
        found = [done[name] for name in names]
        return Timed(
            asked_s, [one.timestamps for one in found], [one.generated_tokens for one in found]
        )


def has_attention(files: ModelFiles, attention: str) -> bool:
    """Whether transformers has this form (`eager` or `sdpa`) for the model."""
    model: Any = auto_model()._model_mapping[type(files.config)]
    return attention == "eager" or model._supports_sdpa


def batching_lacks() -> list[str]:
    """Settings of continuous batching that this transformers does not have yet."""
    there = inspect.signature(ContinuousBatchingConfig).parameters
    return [name for name in ("page_size", "auto_switch_to_flash") if name not in there]


def batch_blocks(batch: int, tokens: int) -> int:
    """Blocks of `PAGE_TOKENS` tokens of KV that so many texts take, and one that is never full."""
    return batch * math.ceil(tokens / PAGE_TOKENS) + 1


def _results(manager: Any, count: int) -> dict[str, Any]:
    """What became of each request, by its name."""
    done: dict[str, Any] = {}
    while len(done) < count:
        result = manager.get_result(timeout=1)
        if result is None and not manager.is_running():
            raise RuntimeError(f"generate_batch stopped with {len(done)} of {count} answers")
        if result is not None and result.error is not None:
            raise RuntimeError(f"generate_batch: {result.error}")
        if result is not None and result.is_finished():
            done[result.request_id] = result
    return done


def _greedy(eos_token_id: int | None = None) -> GenerationConfig:
    return GenerationConfig(do_sample=False, eos_token_id=eos_token_id, pad_token_id=0)
