"""Scaling the rope of a model that was not made for it, so that it takes longer texts."""

from __future__ import annotations

from typing import Any

from ringstar.errors import UserError
from ringstar.models.families import rope_by_kind, rope_types

# layers with a window see no farther in a longer text; where they have rope of their own it stays
FULL = "full_attention"


def extend(config: Any, scaling: str, factor: float) -> None:
    """Write `scaling` (linear, dynamic, yarn) by `factor` into a loaded config, not yet a model's.

    Raises UserError if the rope is scaled already, or the family takes no such rope.
    """
    scaled = sorted(rope_types(config) - {"default"})
    if scaled:
        raise UserError(
            "rope.scaling",
            scaling,
            f"the model's rope is already scaled ({', '.join(scaled)}); allowed: none",
        )
    changed: dict[str, Any] = {"rope_type": scaling, "factor": float(factor)}
    if scaling == "yarn":  # else taken from the config at a later time
        changed["original_max_position_embeddings"] = config.max_position_embeddings
    ropes = rope_by_kind(config)
    if None not in ropes and FULL not in ropes:
        raise UserError("rope.scaling", scaling, "no layer of the model sees all; allowed: none")
    target = ropes[None if None in ropes else FULL]
    target.pop("type", None)  # the older name of `rope_type`
    target.update(changed)
    try:
        config.validate_rope()
    except Exception as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            "rope.scaling", scaling, f"{config.model_type} takes no such rope: {why[0]}"
        ) from error
