"""What every command does that runs on ranks: parse, check, and start them or be one of them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import torch

from launch.faults import DONE, Reporter, exit_status, leave
from launch.inputs import standard_input_kept
from launch.ranks import join_launcher, start_ranks
from launch.streams import open_streams, print_every_letter, show_choices
from ringstar.config import Config
from ringstar.errors import UserError
from ringstar.memory import disk_place
from ringstar.ranks import check_gpus, check_ranks, check_strategy, under_torchrun
from ringstar.trace import check_profile

C = TypeVar("C", bound=Config)


@dataclass(frozen=True, slots=True)
class RankCommand(Generic[C]):
    """A command as `python -m module`.

    `check` finds what is wrong before ranks start; `run` is what each rank does, given the store
    in which it publishes its phases, if the launcher made one.  `help` makes the text of --help.
    """

    module: str
    parse: Callable[[Sequence[str]], C]
    check: Callable[[C], object]
    run: Callable[[C, Any], None]
    help: Callable[[], str]

    def main(self, arguments: Sequence[str]) -> int:
        """Returns the exit status; prints one line for what went wrong."""
        if {"-h", "--help"} & set(arguments):
            print(self.help())
            return DONE
        rank = int(os.environ.get("RANK", "0"))
        reporter = Reporter(rank, local_rank=int(os.environ.get("LOCAL_RANK", rank)))
        return exit_status(lambda: self._start(arguments, reporter), reporter)

    def _start(self, arguments: Sequence[str], reporter: Reporter) -> int:
        config = self.parse(arguments)
        reporter.show_traceback = config.launch.traceback
        if config.launch.report:
            reporter.store = join_launcher(config.launch.report)
        check_launch(config)
        if not config.launch.nproc or under_torchrun():
            begin_rank(config)
            self.run(config, reporter.store)
            return DONE
        with standard_input_kept(config) as (kept, copies):
            self.check(kept)
            others = [a for a in arguments if a.partition("=")[0] not in copies]
            paths = [f"{key}={path}" for key, path in copies.items()]
            return start_ranks(self.module, [*others, *paths], config.launch.nproc)


def run_program(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Make `main` the whole of this process, which ends with the status that it returns."""
    if not under_torchrun():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    open_streams()
    torch.set_grad_enabled(False)
    leave(main(sys.argv[1:]))


def begin_rank(config: Config) -> None:
    """What every rank does first, before it reads anything; raises UserError."""
    show_choices()
    check_ranks(config)
    print_every_letter()


def check_launch(config: Config) -> None:
    """What can be refused before any rank is started."""
    check_profile(config.profile)
    if config.cache.offload == "disk":
        disk_place(config.cache)
    nproc, transport = config.launch.nproc, config.transport
    if nproc is None:
        return
    if under_torchrun():
        started = int(os.environ["WORLD_SIZE"])
        if nproc != started:
            raise UserError("launch.nproc", nproc, f"torchrun started {started} ranks; drop it")
        return
    if transport.name == "threads":
        raise UserError("launch.nproc", nproc, "transport=threads simulates its ranks; drop one")
    if transport.world_size not in (None, nproc):
        raise UserError("transport.world_size", transport.world_size, f"launch.nproc is {nproc}")
    check_strategy(config, nproc)
    if transport.name == "nccl":
        check_gpus(nproc)
