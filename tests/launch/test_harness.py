"""python -m pytest tests/launch/test_harness.py

lm-eval's own command line on ranks: our options, then its arguments.
"""

import json
import shutil
from argparse import Namespace

import pytest

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

import launch.harness
from launch.harness import _alone, parsed, split
from ringstar.config import ModelConfig
from ringstar.harness import RingstarLM
from ringstar.models import find_model
from tests.support.commands import TORCHRUN, environment, json_lines, python
from tests.support.lm_eval_tasks import choices, local_task

COMMAND = launch.harness
# without a look through the 14,000 files of its own tasks
SCRIPT = """
import functools, sys
import torch
from lm_eval.tasks import TaskManager
from launch.harness import main
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
torch.set_grad_enabled(False)
sys.exit(main(sys.argv[1:]))
"""


def test_what_has_a_dash_and_all_after_it_is_the_harness_s():
    arguments = ["model.path=a", "--tasks", "x", "--metadata", "y=1", "launch.report=1:2"]
    assert split(arguments) == (
        ["model.path=a", "launch.report=1:2"],
        ["--tasks", "x", "--metadata", "y=1"],
    )


def test_processes_run_a_task_and_one_of_them_speaks(chat, tmp_path):
    """As if the adapter had been called: the samples' log-likelihoods are in the results."""
    task = local_task(tmp_path, "arc/arc_easy.yaml", choices(3))
    results = tmp_path / "results"
    (tmp_path / "script.py").write_text(SCRIPT)
    own = [f"model.path={chat}", "transport.threads_per_rank=1"]
    theirs = ["--tasks", task, "--include_path", str(tmp_path), "--output_path", str(results)]
    command = [*TORCHRUN, "2", "script.py", *own, *theirs, "--log_samples"]
    run = python(*command, cwd=tmp_path, env=environment(HF_HUB_OFFLINE="1"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("|acc_norm") == 1 and run.stdout.count(task) == 1
    assert "2 ranks over gloo" in run.stderr
    (written,) = results.rglob("results_*.json")
    config = json.loads(written.read_text())["config"]
    assert (config["model"], config["ranks"], config["transport"]) == ("RingstarLM", 2, "gloo")
    (samples,) = results.rglob("samples_*.jsonl")
    lm = RingstarLM(chat, transport="threads", world_size=3, threads_per_rank=1)
    for sample in json_lines(samples):
        for request, (value,) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            pair = type("Request", (), {"args": (request["arg_0"], request["arg_1"])})
            ((want, _),) = lm.loglikelihood([pair], disable_tqdm=True)
            assert float(value[0]) == pytest.approx(want, abs=1e-3)


def test_wrong_input_is_named_before_weights_load(refused, chat, bare, monkeypatch, tmp_path):
    given = [f"model.path={chat}"]
    assert refused(*given).startswith("--tasks: is missing")
    assert "our own options" in refused(*given, "--model", "hf", "--tasks", "x")
    for theirs in (["--model_args=a=b"], ["--model_a", "a=b"], ["--batch", "4"], ["-b8"], ["-M=a"]):
        assert "our own options" in refused(*given, "--tasks", "x", *theirs)
    for line in ("model: hf", "model_args: {a: b}", "batch_size: 4", "device: cuda:1"):
        (tmp_path / "b.yaml").write_text(f"tasks: [x]\n{line}\n")
        said = refused(*given, "--config", str(tmp_path / "b.yaml"))
        assert f"{line.partition(':')[0]}: what runs is said by our own options" in said
    assert "has no tokenizer" in refused(f"model.path={bare}", "--tasks", "x")
    assert "tasks of lm-eval have their own" in refused(*given, "question=Who?", "--tasks", "x")
    assert "--output_path" in refused(*given, "output.path=x", "--tasks", "x")
    star = ["strategy=star", "strategy.anchor_size=1K"]
    assert "give block_size too" in refused(*given, *star, "--tasks", "x")
    assert "harness.query_tokens=0" in refused(*given, "harness.query_tokens=0", "--tasks", "x")
    with monkeypatch.context() as patch:
        patch.setattr(launch.harness, "find_spec", lambda _: None)
        assert refused(*given, "--tasks", "x") == (
            "lm-eval: is not installed: pip install 'ringstar[lm-eval]'"
        )
    monkeypatch.setattr(launch.harness, "under_torchrun", lambda: True)
    for cache in (
        ["--use_cache", "c"],
        ["--use_c=c"],
        ["--config", str(tmp_path / "a.yaml")],
        ["--cache_requests", "true"],
    ):
        (tmp_path / "a.yaml").write_text("use_cache: c")
        assert "transport=threads" in refused(*given, "--tasks", "x", *cache)
    assert "output_path" in refused(*given, "--tasks", "x", "--log_samples")
    assert refused(*given, "--num_fewshot", "1").startswith("--tasks: is missing")
    assert "none.yaml" in refused(*given, "--tasks", "x", "--config", "none.yaml")


def test_a_task_that_the_harness_does_not_have_is_named(chat, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = shutil.copytree(chat, tmp_path / "a,b=c")
    command = ["script.py", f"model.path={folder}", "--tasks", "arc_eazy"]
    run = python(*command, cwd=tmp_path, env=environment(HF_HUB_OFFLINE="1"))
    said = run.stderr.splitlines()[-1]
    assert run.returncode == 2, run.stderr
    assert said.startswith("ringstar: --tasks=arc_eazy: lm-eval has no such task")


def test_what_lm_eval_s_own_file_says_is_taken_in(chat, tmp_path):
    """And what is on the command line comes before it."""
    (tmp_path / "a.yaml").write_text("limit: 3\nnum_fewshot: 2\nwandb_args: {project: a}\n")
    theirs = ["--tasks", "x", "--limit", "5", "--config", str(tmp_path / "a.yaml")]
    found = parsed(theirs, find_model(ModelConfig(path=chat)))
    assert (found.limit, found.num_fewshot, found.config) == (5, 2, None)
    with _alone(found, speaks=False):
        assert "wandb_args" not in found


def test_only_one_process_reports_elsewhere(tmp_path):
    given = {"wandb_args": {"project": "a"}, "trackio_args": {"project": "b"}}
    for speaks in (True, False):
        arguments = Namespace(output_path=str(tmp_path), tasks="x", **given)
        with _alone(arguments, speaks=speaks):
            assert {name for name in given if name in arguments} == (
                set(given) if speaks else set()
            )
            assert (arguments.output_path == str(tmp_path)) == speaks


def test_arguments_that_the_harness_does_not_know_end_as_it_ends(chat, capsys):
    with pytest.raises(SystemExit) as left:
        COMMAND.main([f"model.path={chat}", "--tasks", "x", "--no_such_thing"])
    assert left.value.code == 2
    assert "--no_such_thing" in capsys.readouterr().err
