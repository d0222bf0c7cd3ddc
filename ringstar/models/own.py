"""A model that a user has loaded, and whether ranks can run it exactly."""

from __future__ import annotations

from typing import Any

from ringstar.errors import UserError
from ringstar.models.bind import is_bound
from ringstar.models.facts import ModelFacts
from ringstar.models.families import FAMILIES, check_family
from ringstar.models.quantised import check_quantised


def check_attachable(model: Any) -> ModelFacts:
    """What is to be known of a loaded model; UserError if ranks cannot run it, by name."""
    kind, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not hasattr(model, "generate"):
        raise UserError("model", kind, "needed is a Hugging Face causal language model")
    check_family(kind, config, key="model")
    check_quantised(kind, config, key="model")
    if kind != FAMILIES[config.model_type]:
        raise UserError(
            "model", kind, f"wraps or changes {FAMILIES[config.model_type]}, which is needed itself"
        )
    if is_bound(model):
        raise UserError("model", kind, "is attached already; ringstar.detach(model) first")
    if any(module.training for module in model.modules()):
        raise UserError("model", kind, "is in training mode; call model.eval() first")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        where = ", ".join(sorted(devices))
        raise UserError("model", f"on {where}", "all weights must be on this rank's device")
    if getattr(model, "tp_size", None) not in (None, 1):
        raise UserError("model", f"tp_size={model.tp_size}", "weights must be whole on each rank")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            raise UserError("model", f"config.{name}=True", "ranks make none; allowed: false")
    facts = ModelFacts(config)
    _check_rope(model, facts)
    return facts


def _check_rope(model: Any, facts: ModelFacts) -> None:
    """Frequencies that follow the length are made anew, as a model that was not cast has them."""
    buffers = model.named_buffers() if facts.rope_by_length else ()
    cast = {b.dtype for name, b in buffers if name.endswith("inv_freq") and b.dtype.itemsize < 4}
    if cast:
        what = f"rope in {str(cast.pop()).removeprefix('torch.')}"
        why = "its frequencies were cast with the weights; load the model with dtype=... instead"
        raise UserError("model", what, why)
