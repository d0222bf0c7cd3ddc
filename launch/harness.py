"""Run tasks of the public harness lm-eval on ranks: our options first, then its own arguments.

    python -m launch.harness launch.nproc=4 model.path=DIR --tasks arc_easy,piqa --limit 100
    python -m launch.harness launch.nproc=4 model.path=DIR strategy=star strategy.block_size=4K \\
        --tasks niah_single_1 --metadata '{"max_seq_lengths": [16384]}' --output_path results
    torchrun --standalone --nproc-per-node 4 -m launch.harness model.path=DIR --tasks wikitext

What comes before the first argument with a dash says which model runs how; everything from there on
is for lm-eval (`lm_eval run --help`), but for --model, --model_args, --device and --batch_size,
which our options say.  It needs the extra `lm-eval`; some of its tasks ask for more, such as
lm_eval[ruler].  Tasks that bring their data from the network run offline where it is cached, or
with local files (--include_path).

Each context is encoded once, spread over the ranks, and serves all its continuations.  By star the
last harness.query_tokens of a context are read with exact attention to all of it.
"""

from __future__ import annotations

from launch.interrupts import quiet_interrupts

if __name__ == "__main__":  # the imports below take seconds
    quiet_interrupts()

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from copy import copy
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

from launch.help import help_text
from launch.options import HARNESS
from launch.start import RankCommand, run_program
from launch.streams import choices_unsaid
from launch.weights import usable_model
from ringstar.checks import check_any_length
from ringstar.config import HarnessConfig
from ringstar.errors import UserError, in_a_line
from ringstar.models import ModelFiles
from ringstar.ranks import make_ranks, under_torchrun
from ringstar.runtime import LongContext

_WHAT_RUNS = ("--model", "--model_args", "--device", "--batch_size")
_OURS = "what runs is said by our own options; --help lists them"
NO_LM_EVAL = "is not installed: pip install 'ringstar[lm-eval]'"
_NOT_FOUND = "Tasks not found"  # as lm-eval begins to say it
# arguments with which every process would report
_OF_ONE = ("wandb_args", "wandb_config_args", "trackio_args", "hf_hub_log_args")
_REPORT = "launch.report="  # which the launcher appends


def main(arguments: Sequence[str]) -> int:
    """Parse, start ranks if asked to, evaluate; returns the exit status."""
    own, theirs = split(arguments)
    command = RankCommand(
        "launch.harness",
        lambda _: HARNESS.parse(own),
        partial(check_request, theirs),
        partial(run_rank, theirs),
        help=lambda: help_text(__doc__ or "", HARNESS),
    )
    return command.main(arguments)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and those of lm-eval, which begin with the first that has a dash."""
    report = [argument for argument in arguments if argument.startswith(_REPORT)]
    others = [argument for argument in arguments if not argument.startswith(_REPORT)]
    first = next((i for i, argument in enumerate(others) if argument.startswith("-")), len(others))
    return [*others[:first], *report], others[first:]


def check_request(theirs: Sequence[str], config: HarnessConfig) -> tuple[ModelFiles, Namespace]:
    """All that can be found wrong before ranks start and weights load."""
    if find_spec("lm_eval") is None:
        raise UserError("lm-eval", None, NO_LM_EVAL)
    check_any_length(config.strategy)
    files = usable_model(config)
    if files.tokenizer is None:
        raise UserError("model.path", files.folder, "has no tokenizer, and tasks are text")
    return files, parsed(theirs, files)


def parsed(theirs: Sequence[str], files: ModelFiles) -> Namespace:
    """lm-eval's arguments as it takes them apart itself; it ends the process for wrong ones."""
    from lm_eval._cli import HarnessCLI

    for argument in theirs:
        if name := _says_what_runs(argument):
            raise UserError(name, None, _OURS)
    # tasks that make their texts to measure look for the tokenizer here
    model_args = json.dumps({"pretrained": str(files.folder)})  # a path may hold a comma
    whole = ["lm_eval", "run", "--model", "ringstar", "--model_args", model_args]
    before = sys.argv
    sys.argv = [*whole, *theirs]
    try:
        arguments = HarnessCLI().parse_args()
    finally:
        sys.argv = before
    _check(arguments)
    return arguments


def _says_what_runs(argument: str) -> str | None:
    """The option of lm-eval that is ours to say, if it is one, shortened or not."""
    name = argument.partition("=")[0]
    if name.startswith("--"):
        return next((each for each in _WHAT_RUNS if len(name) > 2 and each.startswith(name)), None)
    return name[:2] if name[:2] in ("-M", "-a", "-b") else None


def _of_file(arguments: Namespace) -> dict[str, Any]:
    """What the config file says, if there is one, which is then done with."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    path = getattr(arguments, "config", None)
    arguments.config = None
    found = EvaluatorConfig.load_yaml_config(path) if path else {}
    for option in _WHAT_RUNS:
        if found.get(option.removeprefix("--")) is not None:
            raise UserError("--config", path, f"{option.removeprefix('--')}: {_OURS}")
    return found


def _check(arguments: Namespace) -> None:
    """Raise UserError for what lm-eval would find wrong; what its config file says is taken in."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    try:
        for name, value in _of_file(arguments).items():
            if not getattr(arguments, name, None) and getattr(arguments, name, None) != 0:
                setattr(arguments, name, value)
        resolved = EvaluatorConfig.from_cli(copy(arguments))
    except (ValueError, TypeError, OSError) as error:
        raise UserError("lm-eval", None, in_a_line(error)) from error
    if not resolved.tasks:
        raise UserError("--tasks", None, "is missing: what shall lm-eval run?")
    for name in ("use_cache", "cache_requests"):
        if under_torchrun() and getattr(resolved, name):
            why = "each rank would keep its own, and ranks must ask the same; use transport=threads"
            raise UserError(f"--{name}", None, why)


def run_rank(theirs: Sequence[str], config: HarnessConfig, phases: Any) -> None:
    """What every rank does: connect, and run all of lm-eval; rank 0 prints and writes."""
    files, arguments = check_request(theirs, config)
    from ringstar.harness import RingstarLM  # lm-eval is installed

    runtime = LongContext(config, files, *make_ranks(config.transport, phases))
    chosen = {key: value for key, value in vars(config.harness).items() if value is not None}
    arguments.model = RingstarLM(runtime=runtime, **chosen)
    with _alone(arguments, speaks=runtime.rank == 0), _named_tasks(), choices_unsaid():
        arguments.func(arguments)
    runtime.close()


@contextmanager
def _named_tasks() -> Iterator[None]:
    """A task that lm-eval does not have is its user's mistake.

    It is found late, for to look through all of them takes lm-eval ten seconds, once a process.
    """
    try:
        yield
    except ValueError as error:
        says, _, names = str(error).partition(": ")
        if says != _NOT_FOUND:
            raise
        why = "lm-eval has no such task; allowed: those of `lm_eval ls tasks`, or of --include_path"
        raise UserError("--tasks", names, why) from error


@contextmanager
def _alone(arguments: Namespace, *, speaks: bool) -> Iterator[None]:
    """What lm-eval and its tasks print and write is the same on every rank: once is enough."""
    with ExitStack() as stack:
        if not speaks:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
            if arguments.output_path:  # not left out: some of its arguments ask for one
                arguments.output_path = stack.enter_context(TemporaryDirectory())
            for name in _OF_ONE:
                if name in arguments:
                    delattr(arguments, name)
        yield


if __name__ == "__main__":
    run_program(main)
