"""Which model made a document's KV."""

from __future__ import annotations

import hashlib
import json
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
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(_sample(weight.detach()))
    return digest.hexdigest()


def _config(model: Any) -> str:
    known = {k: v for k, v in model.config.to_dict().items() if k not in _ELSEWHERE}
    return json.dumps(known, sort_keys=True, default=str)


def _sample(weight: Tensor) -> bytes:
    flat = weight.reshape(-1) if type(weight) is Tensor else weight.data.reshape(-1)
    step = max(1, flat.numel() // _SAMPLED)
    return flat[::step][:_SAMPLED].float().cpu().numpy().tobytes()
