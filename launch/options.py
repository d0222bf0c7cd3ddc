"""From `KEY=VALUE` arguments to a typed config, with errors for people.

Composed by Hydra's Compose API in our own process, so that messages and exit statuses are ours.
Free text never meets Hydra's grammar: `question=What's "it", then?` means what it says.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ringstar import config as schema
from ringstar.errors import UserError

# not by import: a folder `configs` of the user's would come first
CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"
GROUPS = ("strategy", "transport", "kernel", "model", "experiment")
_TEXT_KEYS = {
    *("question", "document.text", "generation.stop", "model.cache_dir", "launch.report"),
    *("compare.star", "compare.picture"),
    *("score.continuation", "score.picture"),
    *("evaluate.tasks", "evaluate.lengths", "evaluate.star", "evaluate.picture"),
    *("bench.lengths", "bench.worlds", "bench.strategy", "bench.batches", "bench.peers"),
    *("bench.picture", "bench.against", "bench.cells"),
}
_PATH_ENDS = ("_path", ".path", ".first_logits", ".save", ".load")


C = TypeVar("C", bound=schema.Config)


@dataclass(frozen=True, slots=True)
class Command(Generic[C]):
    """The options of one command.

    `schema` is what they become, `root` its file in `configs/`, `groups` what may be chosen,
    `repeatable` texts that may be given several times; `fixed` are keys or whole sections that it
    sets itself, and why.
    """

    schema: type[C]
    root: str
    groups: tuple[str, ...]
    repeatable: frozenset[str]
    fixed: Mapping[str, str]

    def parse(self, arguments: Sequence[str]) -> C:
        """Compose and check a config; raises UserError."""
        return _parse(arguments, self)

    def why_fixed(self, key: str) -> str | None:
        return self.fixed.get(key) or self.fixed.get(key.partition(".")[0])


GENERATE = Command(schema.Config, "config", GROUPS, frozenset({"generation.stop"}), {})
_BY_FILE = "questions.path has questions, or they are typed"
ASK = Command(
    schema.AskConfig,
    "ask",
    GROUPS,
    frozenset({"generation.stop"}),
    {
        "question": f"{_BY_FILE}; launch.generate takes one",
        "question_path": f"{_BY_FILE}; launch.generate takes one",
        "output.first_logits": "launch.generate writes those of one question; drop it",
    },
)
_GREEDY = "answers that are compared are greedy; drop it"
COMPARE = Command(
    schema.ComparisonConfig,
    "compare",
    GROUPS[1:],
    frozenset({"generation.stop", "question", "compare.star"}),
    {
        "strategy": "the exact side is ring, or dense on one rank; settings of star are written"
        ' compare.star="block_size=1K anchor_size=256"',
        "generation.temperature": _GREEDY,
        "generation.top_p": _GREEDY,
        "generation.seed": _GREEDY,
        "cache.reuse": "each encode is measured, and starts anew; drop it",
        "output.first_logits": "logits are compared, not written; drop it",
        "document.checkpoint_every": "its documents are compared, not kept; drop it",
        "document.load": "its documents are encoded anew, in every way; give document.path",
        "document.save": "its documents are compared, not kept; drop it",
    },
)
_NOT_KEPT = "its document is scored, not kept; launch.ask keeps it"
SCORE = Command(
    schema.ScoreConfig,
    "score",
    GROUPS,
    frozenset({"score.continuation"}),
    {
        "document.checkpoint_every": _NOT_KEPT,
        "document.save": _NOT_KEPT,
        "generation": "nothing is generated; drop it",
        "output.first_logits": "launch.generate writes those of one question; drop it",
    },
)
_BY_TASK = "tasks of lm-eval have their own; drop it"
HARNESS = Command(
    schema.HarnessConfig,
    "harness",
    GROUPS,
    frozenset(),
    {
        **dict.fromkeys(("document", "generation", "question", "question_path"), _BY_TASK),
        "output": "lm-eval writes its results: --output_path",
    },
)
_OF_TASKS = "tasks make documents and questions, and say how long answers are; drop it"
EVALUATE = Command(
    schema.EvaluationConfig,
    "evaluate",
    GROUPS[1:],
    frozenset({"evaluate.star"}),
    {
        "strategy": "exact is ring, or dense on one rank; settings of star are written"
        ' evaluate.star="block_size=1/4 anchor_size=256"',
        "document": _OF_TASKS,
        "question": _OF_TASKS,
        "question_path": _OF_TASKS,
        "generation": _OF_TASKS,
        "cache.reuse": "each encode is measured, and starts anew; drop it",
        "output.first_logits": "answers are scored, logits are not written; drop it",
    },
)

_OF_GRID = "prompts are made by bench.lengths, answers are bench.new_tokens long; drop it"
BENCH = Command(
    schema.BenchConfig,
    "bench",
    GROUPS[1:],
    frozenset({"bench.strategy"}),
    {
        "strategy": 'strategies are written bench.strategy="star block_size=1/4"',
        **dict.fromkeys(("document", "question", "question_path", "generation"), _OF_GRID),
        "cache.reuse": "each encode is measured, and starts anew; drop it",
        "output.first_logits": "answers are measured, logits are not written; drop it",
        "profile": "recording takes time, and time is measured; launch.generate records",
    },
)


@dataclass(frozen=True, slots=True)
class _Given:
    """One argument, taken apart."""

    text: str
    key: str
    value: str

    @property
    def is_text(self) -> bool:
        return self.key in _TEXT_KEYS or self.key.endswith(_PATH_ENDS)


def parse(arguments: Sequence[str]) -> schema.Config:
    """Compose and check the config of `launch.generate`; raises UserError."""
    return GENERATE.parse(arguments)


def _parse(arguments: Sequence[str], command: Command[C]) -> C:
    given = [_take_apart(argument) for argument in arguments]
    _check_allowed(given, command)
    texts = [item for item in given if item.is_text]
    groups = [item for item in given if item.key in command.groups]
    for item in groups:
        _check_group(item)
    base = _compose([item.text for item in groups], command)
    known = set(option_keys(base))
    for item in given:
        if item.key not in known and item.key not in command.groups:
            raise UserError(item.key, item.value, _unknown(item.key, known, base, command))
    config = _typed(_compose([item.text for item in given if not item.is_text], command))
    assert isinstance(config, command.schema)
    _set_texts(config, texts, command)
    schema.check(config)
    return config


def group_options(group: str) -> list[str]:
    """What may be chosen for a group: its YAML files."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def option_keys(config: DictConfig) -> Iterator[str]:
    """Dotted names of every option; a group's `name` is set by choosing it."""
    for name, value in config.items_ex(resolve=False):
        key = str(name)
        if isinstance(value, DictConfig):
            yield from (f"{key}.{inner}" for inner in option_keys(value))
        elif key != "name":
            yield key


def every_option(command: Command = GENERATE) -> dict[str, object]:
    """Each option of a command, of any choice of strategy, with its default."""
    found: dict[str, object] = {}
    names = group_options("strategy") if "strategy" in command.groups else []
    for overrides in [[f"strategy={name}"] for name in names] or [[]]:
        config = compose_config(overrides, command.root)
        for key in option_keys(config):
            if not command.why_fixed(key):
                found[key] = OmegaConf.select(config, key)
    return dict(
        sorted(found.items(), key=lambda item: item[0].startswith("strategy."), reverse=True)
    )


def compose_config(overrides: Sequence[str], root: str = GENERATE.root) -> DictConfig:
    """Hydra's own composition of `configs/`."""
    _register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(root, overrides=list(overrides))


def _register_schemas() -> None:
    store = ConfigStore.instance()
    # the strategy is chosen by its group alone: a default would fix its type
    store.store(group="schema", name="config", node=schema.Config(strategy=MISSING))
    store.store(group="schema", name="ask", node=schema.AskConfig(strategy=MISSING))
    store.store(group="schema", name="compare", node=schema.ComparisonConfig)
    store.store(group="schema", name="harness", node=schema.HarnessConfig(strategy=MISSING))
    store.store(group="schema", name="score", node=schema.ScoreConfig(strategy=MISSING))
    store.store(group="schema", name="evaluate", node=schema.EvaluationConfig)
    store.store(group="schema", name="bench", node=schema.BenchConfig)
    store.store(group="schema/strategy", name="dense", node=schema.DenseConfig)
    store.store(group="schema/strategy", name="ring", node=schema.RingConfig)
    store.store(group="schema/strategy", name="star", node=schema.StarConfig)
    store.store(group="schema", name="transport", node=schema.TransportConfig)
    store.store(group="schema", name="kernel", node=schema.KernelConfig)
    store.store(group="schema", name="model", node=schema.ModelConfig)


def _take_apart(argument: str) -> _Given:
    key, equals, value = argument.partition("=")
    if not equals or not key:
        raise UserError(argument, None, "options are written KEY=VALUE; --help lists them")
    if key[0] in "+~":
        raise UserError(key, value, "options cannot be added or removed; --help lists them")
    return _Given(argument, key, value)


def _check_allowed(given: Sequence[_Given], command: Command) -> None:
    seen: set[str] = set()
    for item in given:
        if why := command.why_fixed(item.key):
            raise UserError(item.key, item.value, why)
        if item.key in seen - command.repeatable:
            raise UserError(item.key, item.value, "is given twice; once is allowed")
        seen.add(item.key)


def _check_group(item: _Given) -> None:
    options = group_options(item.key)
    if item.value not in options:
        hint = _did_you_mean(item.value, options)
        raise UserError(item.key, item.value, f"{hint}allowed: {', '.join(options)}")


def _compose(overrides: Sequence[str], command: Command) -> DictConfig:
    for override in overrides:
        _check_value(override)
    try:
        return compose_config(overrides, command.root)
    except OmegaConfBaseException as error:
        raise UserError(error.full_key or "config", None, _first_line(error)) from error
    except HydraException as error:
        raise _wrong_value(error, overrides) from error


def _check_value(override: str) -> None:
    key, _, value = override.partition("=")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(key, value, "not a value that can be read; quote it") from error
    if parsed.is_sweep_override():
        raise UserError(key, value, "one value is needed, not several")


def _typed(composed: DictConfig) -> object:
    try:
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(error.full_key or "options", None, _first_line(error)) from error


def _wrong_value(error: HydraException, overrides: Sequence[str]) -> UserError:
    """Which override Hydra means: it names only the key, inside several lines."""
    cause = error.__cause__
    key = getattr(cause, "full_key", None) or ""
    value = next((o.partition("=")[2] for o in overrides if o.partition("=")[0] == key), None)
    return UserError(key or "options", value, _first_line(cause or error))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _unknown(key: str, known: set[str], base: DictConfig, command: Command) -> str:
    section = key.rpartition(".")[0]
    if key in every_option(command):  # but not with what was chosen for its group
        return f"{section}={base[section].name} has no such option"
    beside = [k for k in sorted(known) if k.rpartition(".")[0] == section]
    hint = _did_you_mean(key, [k for k in (*sorted(known), *command.groups) if k != section])
    allowed = f"allowed here: {', '.join(beside)}; " if section and beside else ""
    return f"unknown option; {hint}{allowed}--help lists all"


def _did_you_mean(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean {near[0]}? " if near else ""


def _set_texts(config: schema.Config, texts: Sequence[_Given], command: Command) -> None:
    values: dict[str, list[str]] = {}
    for item in texts:
        values.setdefault(item.key, []).append(item.value)
    for key, given in values.items():
        section, _, name = key.rpartition(".")
        value = given if key in command.repeatable else given[0]
        setattr(getattr(config, section) if section else config, name, value)
