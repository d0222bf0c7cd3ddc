"""transformers' modelling code, imported where a model is made, and quietly.

The import takes seconds, which nobody waits for who asks for --help, mistypes an option or only
starts ranks.  It imports torchao wherever that is installed, needed or not; torchao then warns of
its CUDA libraries on a machine that has no CUDA, and torch of how torchao registers its enums.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import Any

from transformers import AutoModelForCausalLM

_TALKERS = ("torchao", "torch.utils._pytree")


def import_quietly(module: str) -> ModuleType:
    """Import `module`; of what its optional packages say meanwhile only errors are shown."""
    before = {name: logging.getLogger(name).level for name in _TALKERS}
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return importlib.import_module(module)
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def auto_model() -> Any:
    """`AutoModelForCausalLM`, ready to make models."""
    import_quietly("transformers.modeling_utils")
    return AutoModelForCausalLM
