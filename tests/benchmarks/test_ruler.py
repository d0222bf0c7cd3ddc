"""python -m pytest tests/benchmarks/test_ruler.py

The command behind committed results: its options are real, and its report is of what is there.
"""

import json
import re
from pathlib import Path

import pytest

from benchmarks import ruler
from benchmarks.ruler import RESULTS, command_options, main
from launch.evaluate_log import samples_path
from launch.options import EVALUATE
from tests.support.chat import chat_folder

pytest.importorskip("wonderwords")
pytest.importorskip("matplotlib")


def test_its_options_are_those_of_the_command():
    config = EVALUATE.parse(command_options([]))
    assert config.evaluate.star == ["block_size=1/4", "block_size=1/8"]
    assert (config.evaluate.samples, config.evaluate.essay_path) == (40, None)
    assert Path(config.output.path).resolve() == RESULTS / "ruler.json"
    config = EVALUATE.parse(command_options(["evaluate.samples=3", "evaluate.star=block_size=9"]))
    assert (config.evaluate.samples, config.evaluate.star) == (3, ["block_size=9"])


def test_it_runs_and_reports_what_every_setting_had(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ruler, "RESULTS", tmp_path)
    path = str(tmp_path / "ruler.json")
    given = ["model=hf", f"model.path={chat_folder()}", "launch.nproc=null", f"output.path={path}"]
    given += ["evaluate.tasks=qa_1", "evaluate.lengths=800,900", "evaluate.samples=1"]
    assert main(given) == 0
    (report,) = tmp_path.glob("*-ruler.md")
    text = report.read_text()
    assert re.search(r"\| qa_1 \| 1 \| 0% \(0% to 79%\) \| 0% \(0% to 79%\) \| exact near 0", text)
    assert "## 800 tokens" in text and "## 900 tokens" in text
    assert "wonderwords 3.0.1" in text and "1 ranks over threads, float32" in text
    found = json.loads(report.with_suffix(".json").read_text())
    assert (found["circumstances"]["command"].split()[:3], len(found["cells"])) == (
        ["python", "-m", "benchmarks.ruler"],
        6,
    )
    samples = samples_path(path)  # a run that was killed before the last setting
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:5]))
    assert main([*given, ruler.REPORT]) == 0
    text = report.read_text()
    assert "## 800 tokens" in text and "## 900 tokens" not in text
    assert len(samples.read_text().splitlines()) == 5
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:1]))
    report.unlink()
    assert main([*given, ruler.REPORT]) == 2  # nothing to report, and nothing written
    assert not report.exists()
    assert main([*given, ruler.REPORT, "evaluate.depths=x"]) == 2
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert "benchmarks.ruler report" in out
    assert "no cell of a task has a sample" in err and "evaluate.depths=x" in err
