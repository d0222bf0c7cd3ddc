"""Shared by all tests: one compute thread, so that small models are not slowed by waiting ones."""

import pytest
import torch
from transformers.utils import logging as transformers_logging


@pytest.fixture(autouse=True, scope="session")
def _one_compute_thread():
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def pytest_collection_modifyitems(items):
    """Whatever is run on `device="cuda"` is a test for `-m gpu`."""
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("device") == "cuda":
            item.add_marker("gpu")
