"""Turning a loaded Hugging Face model into one that ranks can run: hooks from outside only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from ringstar.models.attention import NAME, ForwardContext, register_attention
from ringstar.models.facts import attention_heads
from ringstar.models.rotary import Rotary


class _FromContext(nn.Module):
    """Stands where the model's rotary module was; layers take theirs from the context."""

    def forward(self, *_: Any, **__: Any) -> None:
        return None


@dataclass(frozen=True)
class BoundModel:
    """A model whose attention and rotary embedding come from a `ForwardContext`.

    `whole` is its own forward, whatever may stand in its place later; `undo` makes the model what
    it was.
    """

    model: Any
    config: Any
    rotary: Rotary
    whole: Callable[..., Any]
    undo: ExitStack

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        context: ForwardContext,
        *,
        logits: Sequence[int] | None,
    ) -> Tensor:
        """Run the model on one rank's tokens; float32 logits (len(logits), vocab) after those.

        Without any it stops before the head: what that takes, (T, hidden size).
        """
        call = self.model.get_decoder() if logits is None else self.whole
        keep = {} if logits is None else {"logits_to_keep": ids_T.new_tensor(logits)}
        output = call(
            input_ids=ids_T.unsqueeze(0),
            position_ids=positions_T.unsqueeze(0),
            use_cache=False,
            ringstar_context=context,
            **keep,
        )
        return output.last_hidden_state[0] if logits is None else output.logits[0].float()

    def head(self, hidden_TC: Tensor) -> Tensor:
        """Float32 logits (T, vocab) of what `forward` gave: by the model's own head and scales."""
        ids = torch.zeros(1, len(hidden_TC), dtype=torch.int64, device=hidden_TC.device)
        given = hidden_TC.unsqueeze(0)
        return self.whole(input_ids=ids, use_cache=False, ringstar_hidden=given).logits[0].float()

    def flops_per_token(self) -> tuple[float, float]:
        """Of one layer's weights, and of its attention per key that a token sees."""
        layer = next(iter(self.model.get_decoder().layers))
        weights = sum(p.numel() for p in layer.parameters())
        heads, _, head_dim = attention_heads(self.config)
        return 2.0 * weights, 4.0 * heads * head_dim


def bind(model: Any, *, ff_slice_tokens: int, rope_precision: str = "float32") -> BoundModel:
    """Hook a model, whichever attention it was loaded with."""
    decoder = model.get_decoder()
    rotary = Rotary(decoder.rotary_emb, decoder.config, rope_precision)
    with ExitStack() as undo:  # whatever goes wrong, a user's model is what it was
        before = model.config._attn_implementation
        if before != NAME:
            register_attention()
            undo.callback(model.set_attn_implementation, before)
            model.set_attn_implementation(NAME)
        undo.callback(setattr, decoder, "rotary_emb", decoder.rotary_emb)
        decoder.rotary_emb = _FromContext()
        put(undo, decoder, "forward", _or_given(decoder.forward))
        for index, layer in enumerate(decoder.layers):
            kind = None if rotary.kinds == (None,) else decoder.config.layer_types[index]
            hook = layer.register_forward_pre_hook(
                partial(_give_position_embeddings, kind=kind), with_kwargs=True
            )
            undo.callback(hook.remove)
            put(undo, layer.mlp, "forward", sliced(layer.mlp.forward, ff_slice_tokens))
        return BoundModel(model.eval(), model.config, rotary, model.forward, undo.pop_all())


def put(undo: ExitStack, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
    """Let `method` stand in for a module's own, until `undo` is closed."""
    own = vars(module)
    if name in own:  # somebody else's stands there already
        undo.callback(setattr, module, name, own[name])
    else:
        undo.callback(delattr, module, name)
    setattr(module, name, method)


def is_bound(model: Any) -> bool:
    """Whether a model is hooked already."""
    return isinstance(model.get_decoder().rotary_emb, _FromContext)


def _give_position_embeddings(
    _: nn.Module, args: tuple, kwargs: dict, *, kind: str | None
) -> tuple[tuple, dict]:
    context = kwargs.get("ringstar_context")
    if context is None:
        return args, kwargs  # the attention function says what is wrong
    return args, {**kwargs, "position_embeddings": context.position_embeddings[kind]}


def _or_given(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder's forward, but for a call that brings what it would give: the head alone runs."""

    @wraps(forward)
    def call(*args: Any, ringstar_hidden: Tensor | None = None, **kwargs: Any) -> Any:
        if ringstar_hidden is None:
            return forward(*args, **kwargs)
        return MoeModelOutputWithPast(last_hidden_state=ringstar_hidden)

    return call


def sliced(forward: Callable[[Tensor], Any], tokens: int) -> Callable[[Tensor], Any]:
    """A feed-forward run in slices of `tokens`, so that its intermediate stays that long.

    Some give a tuple, the hidden states first (gpt_oss: and its router's scores, which no layer
    reads): of these only the hidden states are whole.

    Source: Liu, Abbeel, "Blockwise Parallel Transformer", section 3.
    """

    def in_slices(hidden_BTC: Tensor) -> Any:
        if hidden_BTC.shape[1] <= tokens:
            return forward(hidden_BTC)
        out, rest = torch.empty_like(hidden_BTC), None
        for start in range(0, hidden_BTC.shape[1], tokens):
            part = slice(start, start + tokens)
            made = forward(hidden_BTC[:, part])
            if isinstance(made, tuple):
                made, *rest = made
            out[:, part] = made
        return out if rest is None else (out, *rest)

    return in_slices
