"""python -m pytest tests/test_structure.py

The one direction of imports, and a package name that must not shadow another's.
"""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"localflash", "seqpar", "ringattn", "starattn", "ringstar", "launch"}
MAY_IMPORT = {
    "kernels/localflash": {"localflash"},
    "seqpar": {"seqpar", "localflash"},
    "ringattn": {"ringattn", "seqpar", "localflash"},
    "starattn": {"starattn", "seqpar", "localflash"},
    "ringstar": {"ringstar", "ringattn", "starattn", "seqpar", "localflash"},
    "launch": {"launch", "ringstar"},
}
FILES = [(folder, path) for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize(("folder", "path"), FILES, ids=lambda value: Path(value).name)
def test_imports_go_one_way(folder, path):
    assert tops(path) & OURS <= MAY_IMPORT[folder]


@pytest.mark.parametrize(("folder", "path"), FILES, ids=lambda value: Path(value).name)
def test_only_one_place_knows_each_library(folder, path):
    used = tops(path)
    where = path.relative_to(ROOT).as_posix()
    assert "transformers" not in used or where.startswith("ringstar/models")
    assert not used & {"hydra", "omegaconf"} or folder == "launch"
    assert folder != "kernels/localflash" or used <= {"localflash", "torch", "triton"} | STDLIB


STDLIB = set(sys.stdlib_module_names)


def test_the_check_sees_a_wrong_import(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from ringstar.cache import ShardedCache\nimport launch.generate\n")
    assert tops(wrong) & OURS == {"ringstar", "launch"}


def test_our_kernels_folder_does_not_shadow_the_package_of_that_name(tmp_path):
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("THEIRS = True\n")
    check = (
        "import kernels, localflash; assert kernels.THEIRS;"
        "from pathlib import Path;"
        f"assert Path(localflash.__file__).is_relative_to({str(ROOT)!r})"
    )
    # the current folder comes first on the path, as for a user in a clone
    search = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    subprocess.run(
        [sys.executable, "-c", check],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": search},
    )
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_nothing_reads_the_environment_for_configuration():
    allowed = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    allowed |= {"TORCH_CPP_LOG_LEVEL", "ERROR"}  # written, for torch's own complaints
    for _, path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            named = [
                n.value
                for n in ast.walk(node)
                if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value.isupper()
            ]
            if isinstance(node, (ast.Subscript, ast.Call)) and "environ" in ast.unparse(node):
                assert set(named) <= allowed, f"{path}: {named}"


def command_texts():
    """The text of each command, by its path in launch/."""
    folder = ROOT / "launch"
    texts = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}
    return {name: text for name, text in texts.items() if "\n    run_program(" in text}


def test_no_command_waits_for_what_only_models_need():
    """--help, a wrong option and the launcher of ranks: modelling code takes seconds to import."""
    modules = [f"launch.{name.removesuffix('.py').replace('/', '.')}" for name in command_texts()]
    check = (
        f"import sys, {', '.join(modules)}; assert 'transformers.modeling_utils' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


def test_every_command_is_quiet_before_its_other_imports():
    """Ctrl-C during them, which take seconds, has no traceback."""
    head = [
        "from __future__ import annotations",
        "from launch.interrupts import quiet_interrupts",
        "if __name__ == '__main__':\n    quiet_interrupts()",
    ]
    texts = command_texts()
    named = ("generate", "ask", "compare", "score", "evaluate", "harness", "demo", "bench/peer")
    assert {*(f"{name}.py" for name in named), "bench/__main__.py"} <= set(texts)
    for name, text in texts.items():
        _, *statements = ast.parse(text).body  # the first is the docstring
        assert [ast.unparse(each) for each in statements[:3]] == head, name
    assert tops(ROOT / "launch/interrupts.py") == {"__future__", "os", "signal"}
    assert not tops(ROOT / "launch/__init__.py")


def test_every_package_is_packed():
    """A wheel holds what `packages` lists, and nothing else."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    left_out = ("benchmarks", "tests", "kernels", ".")
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in ROOT.rglob("__init__.py")
        if not path.relative_to(ROOT).as_posix().startswith(left_out)
    }
    assert {"localflash", *found} == set(listed)
