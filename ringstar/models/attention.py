"""The attention function that transformers calls in place of its own.

It only hands over to the `ForwardContext` that came with the call: no state, no globals.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ringstar.models.modeling import import_quietly

NAME = "ringstar"

# cos and sin (1, T, D) for each kind of layer that has its own; None where all share them
PositionEmbeddings = dict[str | None, tuple[Tensor, Tensor]]

# keywords that models pass along and that change nothing here
_IRRELEVANT = {
    "cache_position",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "use_cache",
}


class ForwardContext(Protocol):
    """One forward pass of one rank."""

    position_embeddings: PositionEmbeddings

    def attend(
        self,
        layer: int,
        q_BTHD: Tensor,
        k_BTKD: Tensor,
        v_BTKD: Tensor,
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Keep the new KV and return the attention output (B, T, H, D) in q's dtype.

        `sinks (H,)` is the score of one more key of each head, whose value is 0.
        """
        ...


def ringstar_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    ringstar_context: ForwardContext | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """`query (B, H, T, D)`, `key, value (B, K, T, D)`; returns `((B, T, H, D), None)`."""
    if ringstar_context is None:
        raise RuntimeError(
            "this model was loaded for ringstar: call it through LongContext,"
            " or reload it with attn_implementation='sdpa'"
        )
    unknown = {k for k, v in rest.items() if v is not None} - _IRRELEVANT
    if unknown or dropout or attention_mask is not None:
        what = sorted(unknown) or ["dropout" if dropout else "attention_mask"]
        raise NotImplementedError(f"{type(module).__name__} asks for {', '.join(what)}")
    out = ringstar_context.attend(
        module.layer_idx,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=scaling,
        softcap=softcap,
        window=sliding_window,
        sinks=s_aux,
    )
    return out, None


def register_attention() -> None:
    """Let models be made with `attn_implementation=NAME`, or be given it."""
    modeling = import_quietly("transformers.modeling_utils")
    modeling.AttentionInterface.register(NAME, ringstar_attention)
