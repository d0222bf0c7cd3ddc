"""Calls before, and calls that count: the same for everyone who is measured."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from launch.bench.cells import Load
from launch.bench.memory import peak_since, reset_peak
from launch.bench.plan import prompts_of
from ringstar.config import BenchConfig
from ringstar.models import ModelFiles
from ringstar.timed import Generates, Timed


def timed_calls(
    who: Generates,
    config: BenchConfig,
    files: ModelFiles,
    load: Load,
    device: torch.device,
    before: Callable[[], object] = lambda: None,
) -> tuple[list[Timed], float, int]:
    """Measured calls, the CPU seconds of this process in them, and its peak memory in bytes.

    `before` runs untimed before each call: a barrier, so that ranks begin together.
    """
    given = config.bench
    gc.collect()
    reset_peak(device)
    calls, cpu_s = [], 0.0
    for call in range(given.warm_ups + given.requests):
        prompts = prompts_of(config, files, load, call)
        before()
        started = time.process_time()
        made = who.generate(prompts, given.new_tokens)
        if call >= given.warm_ups:
            calls.append(made)
            cpu_s += time.process_time() - started
    return calls, cpu_s, peak_since(device)
