"""python -m pytest tests/launch/test_options.py

The command line is frozen: an option cannot vanish by accident, and free text is free.
"""

import dataclasses

import pytest
import yaml

from launch import generate
from launch.help import help_text
from launch.options import (
    ASK,
    BENCH,
    COMPARE,
    CONFIG_DIR,
    EVALUATE,
    GENERATE,
    GROUPS,
    HARNESS,
    SCORE,
    every_option,
    group_options,
    parse,
)
from launch.outputs import resolved_config
from ringstar.config import Config

OPTIONS = [
    "cache.dtype",
    "cache.max_bytes",
    "cache.memory_fraction",
    "cache.offload",
    "cache.offload_path",
    "cache.page_tokens",
    "cache.reuse",
    "document.checkpoint_every",
    "document.ids_path",
    "document.load",
    "document.path",
    "document.save",
    "document.text",
    "encode.answer_tokens",
    "encode.chunk_tokens",
    "generation.ignore_eos",
    "generation.max_new_tokens",
    "generation.seed",
    "generation.stop",
    "generation.temperature",
    "generation.top_p",
    "kernel.unified_max",
    "launch.nproc",
    "launch.report",
    "launch.traceback",
    "model.allow_beyond_limit",
    "model.cache_dir",
    "model.dtype",
    "model.ff_slice_tokens",
    "model.path",
    "output.first_logits",
    "output.path",
    "profile.max_events",
    "profile.path",
    "question",
    "question_path",
    "rope.factor",
    "rope.precision",
    "rope.scaling",
    "strategy.anchor_content",
    "strategy.anchor_positions",
    "strategy.anchor_seed",
    "strategy.anchor_size",
    "strategy.anchor_token",
    "strategy.block_size",
    "strategy.layout",
    "strategy.past_by",
    "strategy.share_anchor",
    "transport.threads_per_rank",
    "transport.timeout_s",
    "transport.world_size",
]

# launch.compare: no strategy, nothing of sampling
ASK_OPTIONS = sorted(
    {*OPTIONS, "questions.documents_path", "questions.follow_up", "questions.path"}
    - {"question", "question_path", "output.first_logits"}
)
COMPARE_OPTIONS = sorted(
    {key for key in OPTIONS if not key.startswith("strategy.")}
    - {
        "cache.reuse",
        "document.checkpoint_every",
        "document.load",
        "document.save",
        "output.first_logits",
    }
    - {"generation.seed", "generation.temperature", "generation.top_p"}
    | {
        "compare.needle_trials",
        "compare.needles",
        "compare.picture",
        "compare.probe_tokens",
        "compare.probes",
        "compare.star",
    }
)
SCORE_OPTIONS = sorted(
    {
        *(key for key in OPTIONS if not key.startswith("generation.")),
        "score.continuation",
        "score.path",
        "score.pieces",
        "score.picture",
    }
    - {"document.checkpoint_every", "document.save", "output.first_logits"}
)
HARNESS_OPTIONS = sorted(
    {
        *(key for key in OPTIONS if key.partition(".")[0] not in ("document", "generation")),
        "harness.batch_size",
        "harness.max_length",
        "harness.query_tokens",
        "harness.seed",
    }
    - {"output.first_logits", "output.path", "question", "question_path"}
)

# launch.evaluate: neither document nor question, and answers are greedy
_MADE_BY_TASKS = ("strategy.", "document.", "generation.", "question")
EVALUATE_OPTIONS = sorted(
    {key for key in OPTIONS if not key.startswith(_MADE_BY_TASKS)}
    - {"cache.reuse", "output.first_logits"}
    | {
        "evaluate.depth_samples",
        "evaluate.depths",
        "evaluate.essay_path",
        "evaluate.lengths",
        "evaluate.picture",
        "evaluate.qa_path",
        "evaluate.samples",
        "evaluate.seed",
        "evaluate.star",
        "evaluate.tasks",
    }
)

# launch.bench: prompts are made, and answers are as long as they shall be
BENCH_OPTIONS = sorted(
    {key for key in EVALUATE_OPTIONS if not key.startswith(("evaluate.", "profile."))}
    | {
        "bench.against",
        "bench.batches",
        "bench.cells",
        "bench.lengths",
        "bench.new_tokens",
        "bench.peers",
        "bench.picture",
        "bench.question_tokens",
        "bench.requests",
        "bench.rounds",
        "bench.seed",
        "bench.strategy",
        "bench.tolerance",
        "bench.warm_ups",
        "bench.worlds",
    }
)

CHOICES = {
    "strategy": ["dense", "ring", "star"],
    "transport": ["auto", "gloo", "nccl", "threads"],
    "kernel": [
        "auto",
        "cudnn",
        "efficient",
        "fa3",
        "fa4",
        "flashinfer",
        "flex",
        "reference",
        "torch",
        "triton",
    ],
    "model": ["hf", "smollm2"],
    "experiment": ["chunked", "laptop"],
}

TEXTS = [
    "What's the ship's name (if it has one)?",
    'He said "no", didn\'t he?',
    "a, b, [c], {d: e}, (f)",
    "x=1; y=2",
    "two\nlines\n",
    "Wie heißt 船?  🚢",
    "42",
    "null",
    "true",
    "[]",
    "- a\n- b",
    "${oc.env:HOME}",
    "${unclosed",
    "${{x}}",
    "\\n \\ %s {} $HOME ~ * ?",
    "--help me",
    " spaces around ",
    "=",
    "'",
]
TEXT_KEYS = [
    "question",
    "question_path",
    "document.text",
    "document.path",
    "document.ids_path",
    "document.load",
    "document.save",
    "model.path",
    "model.cache_dir",
    "output.path",
    "output.first_logits",
    "profile.path",
    "generation.stop",
]

GROUP_FILES = sorted(
    path
    for group in GROUPS
    if group != "experiment"
    for path in (CONFIG_DIR / group).glob("*.yaml")
)


def value_of(config: Config, key: str):
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_every_option_is_still_there():
    assert sorted(every_option()) == OPTIONS


def test_every_option_of_compare_is_still_there():
    assert sorted(every_option(COMPARE)) == COMPARE_OPTIONS
    assert COMPARE.groups == ("transport", "kernel", "model", "experiment")


def test_every_option_of_ask_is_still_there():
    assert sorted(every_option(ASK)) == ASK_OPTIONS
    assert ASK.groups == GROUPS


def test_every_option_of_score_is_still_there():
    assert sorted(every_option(SCORE)) == SCORE_OPTIONS
    assert SCORE.groups == GROUPS


def test_every_option_of_harness_is_still_there():
    assert sorted(every_option(HARNESS)) == HARNESS_OPTIONS
    assert HARNESS.groups == GROUPS


def test_every_option_of_bench_is_still_there():
    assert sorted(every_option(BENCH)) == BENCH_OPTIONS
    assert BENCH.groups == COMPARE.groups


def test_every_option_of_evaluate_is_still_there():
    assert sorted(every_option(EVALUATE)) == EVALUATE_OPTIONS
    assert EVALUATE.groups == COMPARE.groups


def test_every_choice_is_still_there():
    assert {group: group_options(group) for group in GROUPS} == CHOICES


def test_every_folder_of_configs_is_a_group():
    folders = {p.name for p in CONFIG_DIR.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_every_yaml_composes(group):
    for name in group_options(group):
        config = parse([f"{group}={name}"])
        assert isinstance(config, Config)
        if group != "experiment":
            assert getattr(config, group).name == name


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_yaml_names_its_schema(path):
    defaults = yaml.safe_load(path.read_text())["defaults"]
    schemas = [entry for entry in defaults if str(entry).startswith("/schema/")]
    assert schemas
    assert all(entry.endswith("@_here_") for entry in schemas)
    assert defaults[-1] == "_self_"


def test_experiments_hold_deltas_only():
    for name in group_options("experiment"):
        content = yaml.safe_load((CONFIG_DIR / "experiment" / f"{name}.yaml").read_text())
        assert not any("schema" in str(entry) for entry in content.get("defaults", []))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (GENERATE, OPTIONS),
        (ASK, ASK_OPTIONS),
        (COMPARE, COMPARE_OPTIONS),
        (SCORE, SCORE_OPTIONS),
        (HARNESS, HARNESS_OPTIONS),
        (EVALUATE, EVALUATE_OPTIONS),
        (BENCH, BENCH_OPTIONS),
    ],
)
def test_every_option_has_a_help_line(command, options):
    lines = help_text("", command).splitlines()
    for key in {*options, *command.groups} - {"launch.report", "bench.cells"}:
        (line,) = [line for line in lines if line.split()[:1] == [key]]
        assert len(line.split()) > 2


def test_help_runs(capsys):
    assert generate.main(["launch.nproc=2", "--help"]) == 0
    out, err = capsys.readouterr()
    assert "generation.top_p" in out
    assert "launch.nproc=4" in out
    assert err == ""


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_literal(text):
    config = parse([f"{key}={text}" for key in TEXT_KEYS] + ["strategy=ring"])
    for key in TEXT_KEYS:
        assert value_of(config, key) == ([text] if key == "generation.stop" else text)


def test_stop_may_be_repeated():
    config = parse(["generation.stop=a, b", "generation.stop=\n", "generation.stop=a, b"])
    assert config.generation.stop == ["a, b", "\n", "a, b"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_a_comparison_are_literal_and_may_be_repeated(text):
    keys = ["question", "compare.star", "generation.stop"]
    config = COMPARE.parse([f"{key}={part}" for key in keys for part in (text, "b", text)])
    for key in keys:
        assert value_of(config, key) == [text, "b", text]
    config = COMPARE.parse([f"compare.picture={text}", f"output.path={text}"])
    assert (config.compare.picture, config.output.path) == (text, text)


@pytest.mark.parametrize("text", TEXTS)
def test_continuations_are_literal_and_may_be_repeated(text):
    config = SCORE.parse([f"score.continuation={part}" for part in (text, "b", text)])
    assert config.score.continuation == [text, "b", text]
    config = SCORE.parse([f"score.picture={text}", f"score.path={text}"])
    assert (config.score.picture, config.score.path) == (text, text)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_an_evaluation_are_literal(text):
    keys = ["tasks", "lengths", "essay_path", "qa_path", "picture"]
    config = EVALUATE.parse([f"evaluate.{key}={text}" for key in keys])
    assert [getattr(config.evaluate, key) for key in keys] == [text] * 5
    config = EVALUATE.parse([f"evaluate.star={part}" for part in (text, "b", text)])
    assert config.evaluate.star == [text, "b", text]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_a_benchmark_are_literal(text):
    keys = ["lengths", "worlds", "batches", "peers", "picture", "against", "cells"]
    config = BENCH.parse([f"bench.{key}={text}" for key in keys])
    assert [getattr(config.bench, key) for key in keys] == [text] * 7
    config = BENCH.parse([f"bench.strategy={part}" for part in (text, "b", text)])
    assert config.bench.strategy == [text, "b", text]


def test_values_that_are_no_text_are_typed():
    config = parse(
        ["generation.top_p=1", "launch.nproc=null", "transport.timeout_s=1e3", "kernel=torch"]
    )
    assert (config.generation.top_p, config.transport.timeout_s) == (1.0, 1000.0)
    assert config.launch.nproc is None
    assert config.kernel.name == "torch"


def test_an_option_beats_its_experiment():
    config = parse(["experiment=laptop", "transport.world_size=2"])
    assert (config.transport.name, config.transport.world_size) == ("threads", 2)
    assert config.model.name == "smollm2"


@pytest.mark.parametrize("text", TEXTS)
def test_resolved_config_says_the_same(text):
    config = parse([f"question={text}", f"document.text={text}", f"generation.stop={text}"])
    read = yaml.safe_load(resolved_config(config))
    want = dataclasses.asdict(config)
    del want["launch"]["report"]
    assert read == want
