"""python -m pytest tests/test_docs.py

What README and docs say is there: options, modules, files, result fields, formulas, examples.
"""

import ast
import importlib.util
import inspect
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import launch.options
from launch import faults, generate, score_result
from launch.__main__ import COMMANDS as launch_commands
from launch.bench.__main__ import with_against
from launch.bench.result import by_key
from launch.harness import split
from launch.options import (
    ASK,
    BENCH,
    COMPARE,
    EVALUATE,
    GENERATE,
    GROUPS,
    HARNESS,
    SCORE,
    every_option,
)
from launch.score_plan import RESULT_FIELDS
from ringattn import Costs, ExtendPlan
from ringstar import LongContext
from ringstar.models import FAMILIES
from ringstar.models.families import ROPE
from seqpar import Layout
from starattn import make_blocks
from tests.ringstar.test_seeded_faults import FAULTS
from tests.support.chat import LINES, chat_folder
from tests.support.commands import TORCHRUN, python
from tests.support.composing import compose_once
from tests.support.models import random_ids, tiny_folder

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for line in re.findall(r"^(?:python|torchrun) .*-m launch.*$", page.read_text(), re.MULTILINE)
]
OF_MODULES = {
    "launch.ask": ASK,
    "launch.compare": COMPARE,
    "launch.harness": HARNESS,
    "launch.score": SCORE,
    "launch.evaluate": EVALUATE,
    "launch.bench": BENCH,
}
BLOCKS = {
    page.name: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for page in (README, ROOT / "docs/python.md", ROOT / "docs/score.md")
}


# the first line of the example that torchrun starts
SCRIPT = "# ask.py: torchrun "


@pytest.fixture(autouse=True)
def _compose_once(monkeypatch):
    monkeypatch.setattr(launch.options, "compose_config", compose_once)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_there_are_commands_and_examples():
    assert len([name for name, _ in COMMANDS if name == "README.md"]) >= 3
    assert all(BLOCKS.values())


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_name_what_exists(page, line):
    words = shlex.split(line)
    module, *options = words[words.index("-m") + 1 :]
    if module == "launch.harness":  # what has a dash, and all after it, is not ours
        options, theirs = split(options)
        assert theirs
    if module == "launch.bench":
        options = with_against(options)
    assert importlib.util.find_spec(module)
    command = OF_MODULES.get(module, GENERATE)
    known = {*every_option(command), *command.groups}
    for option in options:
        assert option.partition("=")[0] in known, option
    command.parse(options)  # values too


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page):
    commands = (GENERATE, *OF_MODULES.values())
    known = {*GROUPS, *(option for command in commands for option in every_option(command))}
    # a comparison's JSON has a list of that name too
    sections = "|".join({key.partition(".")[0] for key in known if "." in key} - {"questions"})
    for key in re.findall(rf"`((?:{sections})\.\w+)(?:=[^`]*)?`", page.read_text()):
        assert key in known or importlib.util.find_spec(key), key


def test_every_result_field_is_described():
    table = (ROOT / "docs/results.md").read_text().partition("## The resolved")[0]
    assert _named(table) == _fields(generate.result_of)


def test_every_field_of_a_score_is_described():
    alone, _, continuations = (ROOT / "docs/score.md").read_text().partition("## Continuations")
    assert _named(alone) == _fields(score_result.result_of)
    assert _named(continuations) == set(RESULT_FIELDS)


def _fields(function):
    """The keys of the dict that it returns, with those of functions whose dicts it takes over."""
    source = ast.parse(inspect.getsource(function))
    returned = next(node for node in ast.walk(source) if isinstance(node, ast.Return)).value
    fields = {key.value for key in returned.keys if key is not None}
    for key, value in zip(returned.keys, returned.values, strict=True):
        if key is None:  # **name(...)
            fields |= _fields(function.__globals__[value.func.id])
    return fields


def _named(page):
    """The fields in the first column of a table."""
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_the_perplexities_are_those_of_the_file_that_is_linked():
    page = (ROOT / "docs/score.md").read_text()
    file = ROOT / "docs" / re.findall(r"\(([^()]+-cpu-perplexity)\.md\)", page)[0]
    found = json.loads(file.with_suffix(".json").read_text())
    ranks = found["over ranks"]
    rings = [row["relative difference"] for name, row in ranks.items() if name.startswith("ring")]
    assert f"at most {max(map(abs, rings)):.1e} off" in page and max(map(abs, rings)) < 1e-4
    for name, shown in {"quarter": "quarters", "eighth": "eighths"}.items():
        row = ranks[f"star, {shown}, 4 ranks"]
        change = 100 * row["relative difference"]
        told = f"a{'n' * (name == 'eighth')} {name} | {row['perplexity']:.4f} | +{change:.2g}% |"
        assert f"star, blocks of {told}" in page


def test_exit_statuses_are_described():
    table = (ROOT / "docs/results.md").read_text().partition("## Exit")[2]
    described = {int(status) for status in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert described == {faults.DONE, faults.FAULT, faults.USER, faults.INTERRUPTED}


def test_the_tree_names_every_file():
    tree = README.read_text().partition("```\nlaunch/")[2].partition("```")[0]
    listed: dict[str, set[str]] = {}
    for line in f"launch/{tree}".splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
            assert (ROOT / folder).is_dir(), folder
        else:
            listed.setdefault(folder, set()).add(name)
    for folder, names in listed.items():
        there = {path.name for path in (ROOT / folder).glob("*.py")}
        assert names == {name for name in there if not name.startswith("__")}, folder


def test_the_models_and_the_faults_are_counted_right():
    text = README.read_text()
    models = text.partition("## Models")[2].partition("##")[0]
    for name in (*FAMILIES, *ROPE):
        assert f"`{name}`" in models
    assert len(FAULTS) == 17
    assert "Seventeen faults" in text


def test_bytes_are_those_of_the_table():
    """A document of 30 tokens a rank, a question of 5, an answer of 1 or 6."""
    world, layers, heads, kv_heads, dim, size, share = 4, 2, 4, 2, 16, 4, 30
    for layout in ("zigzag", "striped", "contiguous"):
        ring = LongContext.from_pretrained(
            tiny_folder("llama"),
            transport="threads",
            world_size=world,
            layout=layout,
            threads_per_rank=1,
        )
        document = ring.encode(random_ids(share * world))
        kv = 2 * share * kv_heads * dim * size
        assert document.metrics.kv_bytes == [layers * kv] * world
        counters = [transport.counters for transport in ring.ranks.transports]
        sent = [counter.bytes_sent for counter in counters]
        hops = [1, 2, 3, 0] if layout == "contiguous" else [world - 1] * world
        assert sent == [layers * hop * kv for hop in hops]
        runs = tuple(Layout(layout, 0, share * world, world).runs(r) for r in range(world))
        plan = ExtendPlan(1, runs, ((),) * world)  # contiguous: rank 0 receives nothing
        token = 2 * kv_heads * dim * size
        costs = Costs(heads=heads, head_dim=dim, itemsize=size, kv_bytes=token)
        added = plan.pass_bytes(costs)
        assert added == 2 * kv + share * heads * (dim + 1) * 4
        for new_tokens in (1, 6):
            before = [counter.bytes_sent for counter in counters]
            ring.ask(document, random_ids(5), max_new_tokens=new_tokens)
            each = (world - 1) * heads * (dim + 1) * 4 * layers
            want = [each * (5 + new_tokens - 1)] * world
            want[0] += new_tokens * (world - 1) * 8
            assert [c.bytes_sent - b for c, b in zip(counters, before, strict=True)] == want


def test_the_results_are_those_of_the_file_that_is_linked():
    section = README.read_text().partition("## Results")[2].partition("##")[0]
    file = ROOT / re.findall(r"\((benchmarks/results/[^)]+)\.md\)", section)[0]
    found = json.loads(file.with_suffix(".json").read_text())
    for part in ("encode", "decode"):
        ratios = [f"{found[part][f'{world} ranks / one process']:.2f}" for world in (2, 4)]
        assert f"| {' | '.join(ratios)} |" in section
    assert f"| {found['attention']['ringattn / one process']:.2f} |" in section
    peer = found["attention"]["ring-attention-pytorch / ringattn"]
    assert f"takes {peer:.1f} times" in section


def test_the_results_of_star_are_those_of_the_file_that_is_linked():
    section = README.read_text().partition("### Star Attention")[2].partition("\n## ")[0]
    file = ROOT / re.findall(r"\((benchmarks/results/[^)]+-star)\.md\)", section)[0]
    found = json.loads(file.with_suffix(".json").read_text())["star"]
    for other in ("none", "ring"):
        ratios = [f"{found[f'{part}: world / {other}']:.2f}" for part in ("eighths", "quarters")]
        assert f"| {' | '.join(ratios)} |" in section


def test_the_peers_are_those_of_the_file_that_is_linked():
    section = (
        README.read_text().partition("### Beside what else there is")[2].partition("\n### ")[0]
    )
    file = ROOT / re.findall(r"\((benchmarks/results/[^)]+-cpu-peers)\.md\)", section)[0]
    known, lengths = by_key(json.loads(file.with_suffix(".json").read_text())), (1024, 2048, 4096)
    shown = {
        "ring (exact) | 1": ("ring", 1),
        "ring (exact) | 2": ("ring", 2),
        "star, quarters | 2": ("star 1/4", 2),
        "Hugging Face `generate`, `eager` | 1": ("hf-eager", 1),
        "Hugging Face `generate`, `sdpa` | 1": ("hf-sdpa", 1),
        "Hugging Face `generate_batch` | 1": ("hf-batch", 1),
        "llama.cpp, weights of 4 bits | 1": ("llama.cpp", 1),
    }
    for name, key in shown.items():
        ratios = [
            known[(*key, length, 1)][quantity] / known["hf-sdpa", 1, length, 1][quantity]
            for quantity in ("median_ttft_ms", "median_tpot_ms")
            for length in lengths
        ]
        assert f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |" in section


def test_the_needles_are_those_of_the_file_that_is_linked():
    section = README.read_text().partition("### Star Attention")[2].partition("\n## ")[0]
    file = ROOT / re.findall(r"\((benchmarks/results/[^)]+-needles)\.md\)", section)[0]
    cells = json.loads(file.with_suffix(".json").read_text())["cells"]
    for tokens in (2048, 4096, 7168):
        rows = [cells[f"{tokens}/1"][name] for name in ("exact", "first block", "no anchor")]
        assert [row["trials"] for row in rows] == [40] * 3
        found = " | ".join(str(row["found"]) for row in rows)
        assert f"| {tokens:,} tokens | {found} |" in section


def test_the_picture_of_star_can_be_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.setattr(sys, "argv", ["draw_star.py", str(tmp_path / "star.png")])
    drawn = runpy.run_path(str(ROOT / "docs/draw_star.py"), run_name="__main__")
    assert (tmp_path / "star.png").read_bytes().startswith(b"\x89PNG")
    tokens, world = drawn["TOKENS"], drawn["WORLD"]
    exact = [pair for rank in range(world) for pair in drawn["exact_pairs"](rank)]
    assert sorted(exact) == [(q, k) for q in range(tokens) for k in range(q + 1)]
    whole = [p for r in range(world) for p in drawn["star_pairs"](make_blocks(tokens, world), r)]
    assert len(whole) == len(set(whole)) == 336
    assert (ROOT / "docs/star.png").stat().st_size < 150_000


def test_the_picture_can_be_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["draw_layouts.py", str(tmp_path / "layouts.png")])
    drawn = runpy.run_path(str(ROOT / "docs/draw_layouts.py"), run_name="__main__")
    assert (tmp_path / "layouts.png").read_bytes().startswith(b"\x89PNG")
    tokens = drawn["TOKENS"]
    for kind in drawn["KINDS"]:  # every causal pair once
        assert sum(map(sum, drawn["work"](kind))) == tokens * (tokens + 1) // 2
    assert (ROOT / "docs/layouts.png").stat().st_size < 150_000


@pytest.mark.parametrize("page", BLOCKS)
def test_examples_run(page, tmp_path, monkeypatch):
    """In order, as one program: later blocks use the names of earlier ones."""
    (tmp_path / "book.txt").write_text("\n".join(LINES * 3))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS[page]:
        if block.startswith(SCRIPT):
            continue  # a program of its own
        code = block.replace('"DIR"', repr(chat_folder()))
        if "__main__" not in code:
            exec(compile(code, page, "exec"), names)
            continue
        Path("example.py").write_text(code)  # its processes have to find its functions
        done = python("example.py", check=True)
        assert done.stdout.strip() == code.strip().rpartition("# ")[2]


def test_the_script_of_the_readme_runs_under_torchrun(tmp_path):
    """Printed once, by rank 0: what one device answers."""
    (script,) = [block for block in BLOCKS["README.md"] if block.startswith(SCRIPT)]
    assert len(script.splitlines()) < 25
    (tmp_path / "book.txt").write_text("\n".join(LINES * 3))
    (tmp_path / "ask.py").write_text(script.replace('"DIR"', repr(chat_folder())))
    alone = script.replace("ringstar.attach(", "Alone(").replace("ringstar.detach(model)", "")
    (tmp_path / "alone.py").write_text(
        alone.replace('"DIR"', repr(chat_folder())).replace(
            "import ringstar\n", "class Alone:\n    rank = 0\n    def __init__(*_, **__): pass\n"
        )
    )
    commands = [*TORCHRUN, "3", "ask.py"], ["alone.py"]
    ranks, one = (python(*command, cwd=tmp_path, check=True).stdout for command in commands)
    assert ranks and ranks == one


def test_every_command_is_named():
    """Whatever can be started is in the list of `python -m launch`."""
    started = {path.stem for path in (ROOT / "launch").glob("*.py") if is_command(path)}
    started |= {path.parent.name for path in (ROOT / "launch").glob("*/__main__.py")}
    assert started == set(launch_commands)


def is_command(path: Path) -> bool:
    return not path.name.startswith("__") and '\nif __name__ == "__main__":\n' in path.read_text()
