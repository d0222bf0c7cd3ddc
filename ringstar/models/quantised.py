"""Weights that transformers' own quantisers keep small: what runs exactly, said before they load.

The quantised layers are left as they are.  What a method needs (a package, a GPU), transformers
knows; ours is only which of them exactness rules out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from ringstar.errors import UserError, in_a_line
from ringstar.models.modeling import import_quietly


def check_quantised(path: str, config: Any, key: str = "model.path") -> None:
    """Raise UserError unless the weights of a model with this `config` can run exactly here."""
    stored = _stored(config)
    if stored is None:
        return
    try:
        settings = _settings(stored)
    except ModuleNotFoundError as error:
        package = (error.name or _method(stored)).partition(".")[0]
        why = f"weights quantised by {_method(stored)} need {package}: pip install {package}"
        raise UserError(key, path, why) from error
    except Exception as error:
        why = f"weights quantised by {_method(stored)} cannot run here: {in_a_line(error)}"
        raise UserError(key, path, why) from error
    if _widened(settings):
        return
    method = _value(settings.quant_method)
    if method not in _ROUNDS_ACTIVATIONS:
        why = f"weights quantised by {method}, which was not shown to round weights alone"
        raise UserError(key, path, why)
    if _ROUNDS_ACTIVATIONS[method](settings):
        raise UserError(
            key,
            path,
            f"weights quantised by {_name(settings)}, which rounds activations too: the last bit of"
            " one, where any two ways to compute attention differ, then changes logits in their"
            " second digit, so that no answer is exact; allowed: methods that round weights alone",
        )


def quantised(config: Any) -> str | None:
    """How the weights of a model with this `config` are quantised, in words; None if they are not.

    The model is one that `check_quantised` let through.
    """
    stored = _stored(config)
    if stored is None:
        return None
    settings = _settings(stored)
    widened = ", which transformers widens while it loads them" if _widened(settings) else ""
    return f"weights quantised by {_name(settings)}{widened}"


def _stored(config: Any) -> Any | None:
    return getattr(config, "quantization_config", None)


def _settings(stored: Any) -> Any:
    """transformers' settings of a quantiser, once it has found all that it needs here.

    Raises whatever that quantiser raises.
    """
    quantisers = import_quietly("transformers.quantizers.auto")
    quantiser = quantisers.AutoHfQuantizer.from_config(copy.deepcopy(stored), pre_quantized=True)
    quantiser.validate_environment(device_map=None, weights_only=True)
    return quantiser.quantization_config


def _method(stored: Any) -> str:
    named = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return _value(named)


def _value(method: Any) -> str:
    """The name of a method, which transformers has as an enum or as a string."""
    return str(getattr(method, "value", method))


def _widened(settings: Any) -> bool:
    """Whether transformers makes ordinary weights of these while it loads them."""
    return bool(getattr(settings, "dequantize", False))


def _name(settings: Any) -> str:
    """The method, and which of its kinds."""
    method = _value(settings.quant_method)
    if method == "torchao":
        kinds = sorted({type(kind).__name__ for kind in _torchao_kinds(settings)})
        return " ".join([method, *kinds])
    if method == "bitsandbytes":
        return f"{method} {'int8' if settings.load_in_8bit else settings.bnb_4bit_quant_type}"
    return method


def _torchao_kinds(settings: Any) -> list[Any]:
    """The kinds of all layers, or of each layer that is named (FqnToConfig)."""
    kind = settings.quant_type
    by_layer = getattr(kind, "fqn_to_config", {"": kind})
    given = [each for each in by_layer.values() if each is not None]
    # AWQ and SmoothQuant say with another one what layers become
    return [getattr(each, "base_config", None) or each for each in given]


def _torchao_rounds(settings: Any) -> bool:
    """Its kinds are named `...WeightOnlyConfig` or `...ActivationConfig`."""
    return any("Activation" in type(kind).__name__ for kind in _torchao_kinds(settings))


def _compressed_rounds(settings: Any) -> bool:
    inner = settings.quantization_config
    if inner is None:  # nothing is quantised, or it is not said what
        return True
    groups = inner.config_groups.values()
    keeps_kv = getattr(inner, "kv_cache_scheme", None) is not None
    return keeps_kv or any(group.input_activations is not None for group in groups)


def _always(settings: Any) -> bool:
    return True


def _never(settings: Any) -> bool:
    return False


# whether a method rounds activations, by its settings
_ROUNDS_ACTIVATIONS: dict[str, Callable[[Any], bool]] = {
    "aqlm": _never,
    "auto-round": _never,
    "awq": _never,
    "bitnet": _always,
    "bitsandbytes": lambda settings: settings.load_in_8bit,
    "compressed-tensors": _compressed_rounds,
    "eetq": _never,
    "fbgemm_fp8": _always,
    "fouroversix": _always,
    "fp8": _always,
    "fp_quant": _always,
    "gemma": _always,
    "gguf": _never,
    "gptq": _never,
    "higgs": _never,
    "hqq": _never,
    "metal": _never,
    "mxfp4": _never,
    "mxfp8": _always,
    "nvfp4": _always,
    "quanto": lambda settings: getattr(settings, "activations", None) is not None,
    "sinq": _never,
    "spqr": _never,
    "torchao": _torchao_rounds,
    "vptq": _never,
}
