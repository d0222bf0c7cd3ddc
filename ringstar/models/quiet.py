"""transformers imported without what its optional packages say of themselves.

It imports torchao wherever that is installed, needed or not; torchao then warns of its CUDA
libraries on a machine that has no CUDA, and torch of how torchao registers its enums.
"""

from __future__ import annotations

import importlib
import logging


def _import_quietly(module: str, *loggers: str) -> None:
    """Import `module`; of what these loggers say meanwhile only errors are shown."""
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        importlib.import_module(module)
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


_import_quietly("transformers.modeling_utils", "torchao", "torch.utils._pytree")
