"""Forward passes, layers, attention and its local kernels, recorded from outside of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from localflash import Backend
from ringstar.models import BoundModel, ForwardContext, PositionEmbeddings
from ringstar.trace.recorder import Recorder


@dataclass(frozen=True)
class TracedModel(BoundModel):
    """A bound model as one rank runs it; its layers are hooked once for all ranks."""

    recorder: Recorder

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        context: ForwardContext,
        *,
        logits: Sequence[int] | None,
    ) -> Tensor:
        name = f"forward of {len(ids_T)}"
        began = self.recorder.begin(name)
        traced = TracedContext(context, self.recorder)
        made = super().forward(ids_T, positions_T, traced, logits=logits)
        self.recorder.end("forward", name, began, {"tokens": len(ids_T)})
        return made

    def head(self, hidden_TC: Tensor) -> Tensor:
        began = self.recorder.begin("head")
        logits_TV = super().head(hidden_TC)
        self.recorder.end("head", "head", began, {"tokens": len(hidden_TC)})
        return logits_TV


@dataclass
class TracedContext:
    """One forward pass of one rank: `inner`, and when the layer that is under way began."""

    inner: ForwardContext
    recorder: Recorder
    began: list[Any] = field(default_factory=list)
    position_embeddings: PositionEmbeddings = field(init=False)

    def __post_init__(self) -> None:
        self.position_embeddings = self.inner.position_embeddings

    def attend(
        self, layer: int, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, **settings: Any
    ) -> Tensor:
        """As `inner`; exchanges with other ranks are part of it."""
        self.recorder.about = {}
        began = self.recorder.begin("attention")
        out_BTHD = self.inner.attend(layer, q_BTHD, k_BTKD, v_BTKD, **settings)
        self.recorder.end("attention", "attention", began, {})
        return out_BTHD


def hook_layers(model: BoundModel) -> None:
    """Let each layer tell the context that comes with a call when it begins and ends."""
    for index, layer in enumerate(model.model.get_decoder().layers):
        name = f"layer {index}"
        hooks = (
            layer.register_forward_pre_hook(partial(_begin, name), with_kwargs=True),
            layer.register_forward_hook(partial(_end, name), with_kwargs=True),
        )
        for hook in hooks:
            model.undo.callback(hook.remove)


def _begin(name: str, _: nn.Module, __: tuple, kwargs: dict[str, Any]) -> None:
    context = kwargs.get("ringstar_context")
    if isinstance(context, TracedContext):
        context.began.append(context.recorder.begin(name))


def _end(name: str, _: nn.Module, __: tuple, kwargs: dict[str, Any], ___: Any) -> None:
    context = kwargs.get("ringstar_context")
    if isinstance(context, TracedContext):
        context.recorder.end("layer", name, context.began.pop(), {})


def traced_backend(backend: Backend, recorder: Recorder) -> Backend:
    """The same local attention, each call recorded."""
    calls: dict[str, Any] = {
        name: _recorded(call, backend.name, recorder)
        for name in ("attend", "attend_cached", "attend_unified")
        if (call := getattr(backend, name)) is not None
    }
    return replace(backend, **calls)


def _recorded(call: Callable[..., Any], name: str, recorder: Recorder) -> Callable[..., Any]:
    def attend(q_BTHD: Tensor, *others: Any) -> Any:
        began = recorder.begin(name)
        made = call(q_BTHD, *others)
        keys = others[0]
        tokens = keys.shape[1] if isinstance(keys, Tensor) else keys.tokens
        details = {"queries": q_BTHD.shape[1], "keys": tokens, **recorder.about}
        recorder.end("kernel", name, began, details)
        return made

    return attend
