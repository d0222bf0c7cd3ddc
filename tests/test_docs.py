"""python -m pytest tests/test_docs.py

What README and docs say is there: options, modules, files, result fields, examples.
"""

import ast
import importlib.util
import inspect
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from launch import generate
from launch.options import GROUPS, compose_config, option_keys

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_what_exists(page):
    known = {*option_keys(compose_config([])), *GROUPS}
    for line in re.findall(r"^.*-m launch\.\w+ .*$", page.read_text(), re.MULTILINE):
        _, module, *options = shlex.split(line.partition("-m ")[0] + line[line.index("-m ") :])[
            shlex.split(line).index("-m") :
        ]
        assert importlib.util.find_spec(module)
        for option in options:
            assert option.partition("=")[0] in known, option


def test_every_result_field_is_described():
    source = ast.parse(inspect.getsource(generate.result_of))
    returned = next(node for node in ast.walk(source) if isinstance(node, ast.Return)).value
    fields = {key.value for key in returned.keys}
    table = (ROOT / "docs/results.md").read_text().partition("## Exit")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == fields


def test_the_picture_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw_layouts.py", str(tmp_path / "layouts.png")])
    runpy.run_path(str(ROOT / "docs/draw_layouts.py"), run_name="__main__")
    assert (tmp_path / "layouts.png").read_bytes().startswith(b"\x89PNG")


def test_the_attention_example_runs():
    page = (ROOT / "docs/python.md").read_text()
    example = next(
        code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "k, v" in code
    )
    names: dict = {}
    exec(compile(example, "docs/python.md", "exec"), names)
    assert sum(share.shape[1] for share in names["shares"]) == names["length"]
