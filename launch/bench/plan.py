"""The grid: who is measured, at which lengths and batches, on how many ranks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch

from launch.bench import attention
from launch.bench.cells import Load
from launch.bench.peers import PEERS, Request
from launch.evaluate_star import Contender
from launch.evaluate_star import label_of as star_label
from launch.sizes import listed, read_lengths, read_sizes
from ringstar.config import (
    BenchConfig,
    EncodeConfig,
    ModelConfig,
    StrategyConfig,
    check,
    strategy_config,
)
from ringstar.errors import UserError
from ringstar.models import ModelFiles, choose_dtype
from ringstar.ranks import under_torchrun, usable_cores, world_size_of

KEY = "bench.strategy"
DEFAULT = ("ring", "star block_size=1/4")


@dataclass(frozen=True)
class Plan:
    """Strategies run on each number of ranks, peers in a process; all of them with each load."""

    strategies: list[Contender]
    worlds: list[int]
    peers: list[str]
    loads: list[Load]
    config: BenchConfig
    notes: list[str]

    def here(self, world: int) -> list[Contender]:
        """The strategies that so many ranks can run."""
        return [each for each in self.strategies if world == 1 or each.label != "dense"]

    def cells(self) -> Iterator[tuple[str, int, Load]]:
        """Everything that is measured: who, on how many ranks, with which load."""
        for world in self.worlds:
            yield from ((c.label, world, load) for c in self.here(world) for load in self.loads)
        yield from ((peer, 1, load) for peer in self.processes for load in self.loads)

    def attention(self) -> Iterator[tuple[str, int, int]]:
        """What is measured of attention alone: who, on how many ranks, how long."""
        for world in self.worlds if attention.PEER in self.peers else ():
            for who in attention.contenders(world):
                yield from ((who, world, length) for length in self.lengths)

    @property
    def lengths(self) -> list[int]:
        return sorted({load.length for load in self.loads})

    @property
    def processes(self) -> list[str]:
        """The peers that generate, each in a process of its own."""
        return [peer for peer in self.peers if peer in PEERS]


def make_plan(config: BenchConfig, files: ModelFiles) -> Plan:
    """Read and check the whole grid; raises UserError."""
    given = config.bench
    strategies = read_strategies(given.strategy)
    lengths = read_lengths("bench.lengths", given.lengths)
    worlds, notes = _worlds(config)
    batches = read_sizes("bench.batches", given.batches)
    loads = [Load(length, batch) for batch in batches for length in lengths]
    plan = Plan(strategies, worlds, [], loads, config, notes)
    for world in worlds:
        if not plan.here(world):
            raise UserError(KEY, "dense", f"runs on one rank, not {world}; add ring, or drop it")
        for strategy in plan.here(world):
            for length in lengths:
                _check(config, files, strategy, world, length)
    _check_batches(config, loads)
    peers, skipped = _peers(plan, files)
    return replace(plan, peers=peers, notes=[*notes, *_idle_cores(config, worlds), *skipped])


def request_of(config: BenchConfig, files: ModelFiles, load: Load, device: torch.device) -> Request:
    """A load as peers take it: with all cores, as all ranks together have them."""
    dtype, _ = choose_dtype(config.model, files.config, device)
    threads, new_tokens = usable_cores(), config.bench.new_tokens
    return Request(files, device, dtype, threads, load.length, new_tokens, load.batch)


def own_device() -> torch.device:
    """Of what runs in one process."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def prompts_of(config: BenchConfig, files: ModelFiles, load: Load, call: int) -> list[list[int]]:
    """The prompts of one call, others for each call: the same for everyone who is measured.

    Random tokens, none of which ends a text.
    """
    ends = files.end_tokens()
    allowed = [token for token in range(files.vocab_size) if token not in ends]
    made = random.Random(f"{config.bench.seed}/{load.length}/{load.batch}/{call}")
    return [made.choices(allowed, k=load.length) for _ in range(load.batch)]


def read_strategies(given: Sequence[str]) -> list[Contender]:
    """As a user writes them, `ring layout=striped` or `star block_size=1/4`; raises UserError."""
    found: dict[str, Contender] = {}
    for text in given or DEFAULT:
        name, _, rest = text.strip().partition(" ")
        contender = _strategy(text, name, rest.strip())
        if contender.label in found:
            raise UserError(KEY, text, "is given twice; once is allowed")
        found[contender.label] = contender
    return list(found.values())


def _strategy(text: str, name: str, rest: str) -> Contender:
    if name == "star" and rest:
        return Contender(star_label(rest, KEY), rest, key=KEY)
    try:
        strategy = strategy_config(name)
    except UserError as error:
        raise UserError(KEY, text, error.allowed) from error
    names = [field.name for field in fields(strategy) if field.name != "name"]
    for word in rest.split():
        field, equals, value = word.partition("=")
        if not equals or field not in names:
            allowed = f"FIELD=VALUE of {', '.join(names)}" if names else f"{name} alone"
            raise UserError(KEY, text, f"{word}: allowed: {allowed}")
        strategy = replace(strategy, **{field: value})
    try:
        check(BenchConfig(strategy=strategy))
    except UserError as error:
        raise UserError(KEY, text, str(error).replace("strategy.", "")) from error
    return Contender(_label(strategy), text, exact=strategy)


def _label(strategy: StrategyConfig) -> str:
    """The name, and what is not as usual."""
    usual = strategy_config(strategy.name)
    others = [
        str(getattr(strategy, field.name))
        for field in fields(strategy)
        if getattr(strategy, field.name) != getattr(usual, field.name)
    ]
    return " ".join([strategy.name, *others])


def _check_batches(config: BenchConfig, loads: Sequence[Load]) -> None:
    """Raise UserError for what batches, which an attached model reads, cannot have."""
    if all(load.batch == 1 for load in loads):
        return
    for key, asked, usual in (
        ("rope.scaling", config.rope.scaling, "none"),
        ("kernel.unified_max", config.kernel.unified_max, False),
        ("model.ff_slice_tokens", config.model.ff_slice_tokens, ModelConfig().ff_slice_tokens),
        ("encode.answer_tokens", config.encode.answer_tokens, EncodeConfig().answer_tokens),
    ):
        if asked != usual:
            raise UserError(key, asked, "only one prompt at a time has it: bench.batches=1")


def _peers(plan: Plan, files: ModelFiles) -> tuple[list[str], list[str]]:
    """Who is measured beside, and who is not and why; UserError for one that was asked by name."""
    given, every = listed(plan.config.bench.peers), [*PEERS, attention.PEER]
    if not given:
        given = [""]
    if given == ["none"]:
        return [], []
    if plan.config.bench.cells:  # it was looked at before this process was started
        return given, []
    by_name = given not in (["auto"], ["all"])
    if unknown := [name for name in given if name not in every] if by_name else []:
        why = f"{unknown[0]}: allowed: auto, all, none, or of {', '.join(every)}"
        raise UserError("bench.peers", plan.config.bench.peers, why)
    reasons = {name: _why_not(name, plan, files) for name in (given if by_name else every)}
    absent = {name: why for name, why in reasons.items() if why is not None}
    for name, why in absent.items() if given != ["auto"] else ():
        raise UserError("bench.peers", plan.config.bench.peers, f"{name}: {why}")
    notes = [f"{name} is not measured: {why}" for name, why in absent.items()]
    return [name for name in reasons if name not in absent], notes


def _why_not(name: str, plan: Plan, files: ModelFiles) -> str | None:
    """Why it can run no load at all; None if it can run one."""
    config, device = plan.config, own_device()
    if under_torchrun():
        return "has processes of its own, and torchrun started ours: drop torchrun for it"
    if name == attention.PEER:
        dtype, _ = choose_dtype(config.model, files.config, device)
        halves = device.type == "cuda" and dtype == torch.float32
        return attention.why_never(plan.worlds, config.transport.name, halves)
    reasons = [PEERS[name].why_not(request_of(config, files, each, device)) for each in plan.loads]
    return None if None in reasons else reasons[0]


def _worlds(config: BenchConfig) -> tuple[list[int], list[str]]:
    """How many ranks, and why; raises UserError."""
    given, transport = config.bench.worlds, config.transport
    simulated = transport.name == "threads"
    asked = config.launch.nproc or (None if simulated else transport.world_size)
    if config.launch.nproc and simulated:
        why = "transport=threads simulates its ranks; bench.worlds says how many"
        raise UserError("launch.nproc", config.launch.nproc, why)
    if given is not None and asked and not config.bench.cells:
        raise UserError("bench.worlds", given, f"{asked} ranks are asked for elsewhere; drop one")
    if under_torchrun() and transport.name != "threads":
        started = world_size_of(transport)
        if given is not None and read_sizes("bench.worlds", given) != [started]:
            raise UserError("bench.worlds", given, f"torchrun started {started} ranks; drop it")
        return [started], []
    if given is not None:
        return read_sizes("bench.worlds", given), []
    asked = asked or transport.world_size
    gpus = torch.cuda.device_count()
    most = asked or gpus or 2
    why = "as asked" if asked else "the GPUs here" if gpus else "no GPU here"
    return sorted({1, most}), [f"bench.worlds={','.join(map(str, sorted({1, most})))} ({why})"]


def _idle_cores(config: BenchConfig, worlds: Sequence[int]) -> Iterator[str]:
    """Ranks have equally many threads, so that they compute alike."""
    if own_device().type != "cpu" or config.transport.threads_per_rank or under_torchrun():
        return
    cores = usable_cores()
    for world in worlds:
        if world < cores and cores % world:
            yield f"{world} ranks compute on {cores - cores % world} of {cores} cores"


def _check(
    config: BenchConfig, files: ModelFiles, contender: Contender, world: int, length: int
) -> None:
    """Raise UserError for a prompt that a strategy or the model cannot take."""
    query, new = config.bench.question_tokens, config.bench.new_tokens
    context = length - query
    if context < 1:
        why = f"allowed: above bench.question_tokens={query}"
        raise UserError("bench.lengths", length, why)
    try:
        contender.fitting(config, files, world, context, query, new)
    except UserError as error:
        if error.key == KEY:
            raise UserError(KEY, contender.given, f"at {length} tokens: {error.allowed}") from error
        why = f"{contender.label}: {error}".replace("strategy.", "")
        raise UserError("bench.lengths", length, why) from error
