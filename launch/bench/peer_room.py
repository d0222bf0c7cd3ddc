"""About how much memory a peer takes for a cell, so that one too large is refused.

Weights are left out: they take the same whatever the cell.
"""

from __future__ import annotations

from typing import Any

import torch

from ringstar.models import attention_heads
from ringstar.models.plain_generate import PAGE_TOKENS, PASS_TOKENS, batch_blocks


def eager_bytes(config: Any, dtype: torch.dtype, batch: int, prompt: int, new: int) -> int:
    """With `eager`: scores (batch, heads, prompt, prompt), twice or more at once, and KV.

    Products and what they are scaled to exist together; softmax is in float32, and the CPU widens
    a copy for it.  The mask is as large for one head.
    """
    each = max(2 * dtype.itemsize, 8 + dtype.itemsize if dtype.itemsize < 4 else 8)
    masked = config.num_attention_heads * each + dtype.itemsize
    return batch * prompt**2 * masked + plain_bytes(config, dtype, batch, prompt, new)


def plain_bytes(config: Any, dtype: torch.dtype, batch: int, prompt: int, new: int) -> int:
    """With `sdpa`: KV of all, and what one layer's feed-forward part makes of the prompt."""
    tokens = batch * (prompt + new) * _kv_bytes(config, dtype)
    wide = 3 * config.intermediate_size + 4 * config.hidden_size
    return tokens + batch * prompt * wide * dtype.itemsize


def batch_bytes(config: Any, dtype: torch.dtype, batch: int, prompt: int, new: int) -> int:
    """With `generate_batch`: a paged cache, one layer's KV for every head, and a mask of a pass."""
    kept = PAGE_TOKENS * batch_blocks(batch, prompt + new)
    read = min(PASS_TOKENS, batch * (prompt + new))
    seen = kept + read
    q_heads, _, dim = attention_heads(config)
    heads = 2 * q_heads * dim * dtype.itemsize
    wide = (3 * config.intermediate_size + 4 * config.hidden_size) * dtype.itemsize
    return kept * _kv_bytes(config, dtype) + seen * heads + read * (seen * dtype.itemsize + wide)


def llama_bytes(config: Any, dtype: torch.dtype, batch: int, prompt: int, new: int) -> int:
    """With llama.cpp: KV in float16, whatever `dtype` others have."""
    return batch * (prompt + new) * _kv_bytes(config, torch.float16)


def _kv_bytes(config: Any, dtype: torch.dtype) -> int:
    """Of one token in all layers."""
    _, kv_heads, dim = attention_heads(config)
    return 2 * config.num_hidden_layers * kv_heads * dim * dtype.itemsize
