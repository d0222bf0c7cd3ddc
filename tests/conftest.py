"""Shared by all tests: one compute thread, so that small models are not slowed by waiting ones."""

import pytest
import torch
from transformers.utils import logging as transformers_logging

import localflash.quantised


@pytest.fixture(autouse=True, scope="session")
def _one_compute_thread():
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@pytest.fixture(scope="module")
def widened_in_small_pieces():
    """Quantised KV of a few tokens is widened in several pieces, as that of many is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localflash.quantised, "WIDEN_TOKENS", 7)
        yield


def pytest_collection_modifyitems(items):
    """Whatever is run on `device="cuda"` is a test for `-m gpu`."""
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("device") == "cuda":
            item.add_marker("gpu")
