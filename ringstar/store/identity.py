"""Which model made a document's KV."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

# say nothing of what the model computes
_ELSEWHERE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
_SAMPLED = 16


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's config and of samples of every weight, as it is loaded.

    Not of all weights: that takes minutes for a large model.  Fine-tuning moves all of a weight.
    """
    digest = hashlib.sha256(_config(model).encode())
    for name, weight in sorted(_kept(model)):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(_sample(weight.detach()))
    return digest.hexdigest()


def _kept(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and buffers that are saved with them: some quantisers keep weights in those."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _config(model: Any) -> str:
    known = {k: v for k, v in model.config.to_dict().items() if k not in _ELSEWHERE}
    return json.dumps(known, sort_keys=True, default=str)


def _sample(weight: Tensor) -> bytes:
    flat = weight.reshape(-1) if type(weight) is Tensor else weight.data.reshape(-1)
    step = max(1, flat.numel() // _SAMPLED)
    return flat[::step][:_SAMPLED].float().cpu().numpy().tobytes()
