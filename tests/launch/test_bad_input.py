"""python -m pytest tests/launch/test_bad_input.py

Wrong input ends with status 2 and one line that names it, before any weight is read.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import launch.demo
import launch.generate
from ringstar.config import ModelConfig, RingConfig
from ringstar.models import find_model
from ringstar.models.one_device import PlainAnswer
from tests.support.commands import environment, python
from tests.support.models import LONGROPE, tiny_folder

COMMAND = launch.generate
QUESTION = "question=Who?"


pytestmark = pytest.mark.usefixtures("untouched")


def says(line: str, *parts: str) -> None:
    for part in parts:
        assert part in line, f"{part!r} not in {line!r}"


# -- documents and questions ---------------------------------------------------------------


@pytest.mark.parametrize("key", ["document.path", "question_path"])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b" \n\t \n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"good \xff\xfe bad", "byte 5 is not UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "not UTF-8"),
        (b"text\0text", "zero bytes"),
    ],
)
def test_unusable_text(refused, tmp_path, chat, book, key, content, why):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    other = QUESTION if key == "document.path" else f"document.path={book}"
    says(refused(f"model.path={chat}", other, f"{key}={path}"), f"{key}={path}", why)


@pytest.mark.parametrize("key", ["document.path", "document.ids_path", "question_path"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none", "no such file"),
        ("", "is a directory"),
        ("a" * 300, "too long"),
        ("file/below", "not a directory"),
    ],
)
def test_unreadable_file(refused, tmp_path, chat, book, key, name, why):
    (tmp_path / "file").write_text("x")
    others = [f"document.path={book}"] if key == "question_path" else [QUESTION]
    line = refused(f"model.path={chat}", *others, f"{key}={tmp_path}/{name}")
    says(line, f"{key}=", "cannot be read", why)


def test_file_without_permission(refused, monkeypatch, chat):
    def denied(_):
        raise PermissionError(13, "Permission denied")  # root is never denied for real

    monkeypatch.setattr(Path, "read_bytes", denied)
    line = refused(f"model.path={chat}", QUESTION, "document.path=/x")
    says(line, "document.path=/x", "permission denied")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([QUESTION], ["document:", "exactly one", "given: none"]),
        (
            [QUESTION, "document.text=a", "document.path=b"],
            ["exactly one", "document.path and document.text"],
        ),
        (
            [QUESTION, "document.text=a", "document.ids_path=b"],
            ["exactly one", "document.text and document.ids_path"],
        ),
        ([QUESTION, "document.text="], ["document.text", "is empty"]),
        ([QUESTION, "document.text= \n "], ["document.text", "is empty"]),
        ([QUESTION, "document.text=a\udcff"], ["document.text", "UTF-8"]),
        (["document.text=a"], ["question", "exactly one", "given: none"]),
        (["document.text=a", QUESTION, "question_path=b"], ["question and question_path"]),
        (["document.text=a", "question="], ["question", "is empty"]),
        (["document.text=a", "question=  "], ["question", "is empty"]),
        (["document.text=a", "question=\udcff"], ["question", "UTF-8"]),
        (["document.path=-", "document.path=-", QUESTION], ["document.path=-", "twice"]),
        (
            ["document.path=-", "question_path=-"],
            ["question_path=-", "standard input is document.path already"],
        ),
    ],
)
def test_one_document_and_one_question(refused, monkeypatch, chat, arguments, parts):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    says(refused(f"model.path={chat}", *arguments), *parts)
    if "-" in "".join(arguments):
        says(refused(f"model.path={chat}", "launch.nproc=2", *arguments), *parts)


def test_standard_input_cannot_be_shared_by_torchrun(refused, monkeypatch, chat):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(f"model.path={chat}", QUESTION, "document.path=-")
    says(line, "document.path=-", "launch.nproc")


def test_other_ranks_of_torchrun_stay_silent(capsys, monkeypatch, chat):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert COMMAND.main([f"model.path={chat}", "nonsense"]) == 2
    assert capsys.readouterr() == ("", "")


# -- token ids -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "why"),
    [
        ([1, -1], "document=-1: token ids must be from 0 to 96"),
        ([97], "document=97"),
        ([10**400], "token ids must be"),
        ([], "document: is empty"),
        ([True], "lists of integers"),
        ([1.0], "lists of integers"),
        (["1"], "lists of integers"),
        ([None], "lists of integers"),
        ("123", "lists of integers"),
        ({"0": 1}, "lists of integers"),
        (None, "lists of integers"),
    ],
)
def test_bad_context_ids(refused, ids_file, bare, context, why):
    says(refused(f"model.path={bare}", f"document.ids_path={ids_file(context)}"), why)


@pytest.mark.parametrize("query", [[97], [-5], [True], [2.5], "12"])
def test_bad_query_ids(refused, tmp_path, bare, query):
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({"context_ids": [1], "query_ids": query}))
    line = refused(f"model.path={bare}", f"document.ids_path={path}")
    assert "question=" in line or "query_ids" in line


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b"3", b"null", b'{"ids": [1]}', b"\xff\xfe\0", b"[" * 100_000],
    ids=range(8),
)
def test_ids_file_of_another_form(refused, tmp_path, bare, content):
    path = tmp_path / "ids.json"
    path.write_bytes(content)
    line = refused(f"model.path={bare}", f"document.ids_path={path}")
    says(line, "document.ids_path=", '{"context_ids": [...], "query_ids": [...]}')


def test_ids_with_a_question_that_needs_a_tokenizer(refused, ids_file, bare):
    path = ids_file([1, 2], query=None)
    line = refused(f"model.path={bare}", f"document.ids_path={path}", QUESTION)
    says(line, "no tokenizer", "document.ids_path")
    line = refused(f"model.path={bare}", f"document.ids_path={path}")
    says(line, "exactly one of question")
    line = refused(f"model.path={bare}", f"document.ids_path={ids_file([1])}", QUESTION)
    says(line, "query_ids already")
    line = refused(f"model.path={bare}", f"document.ids_path={ids_file([1])}", "generation.stop=x")
    says(line, "generation.stop=x", "tokenizer")


def test_document_beyond_the_models_limit(refused, ids_file, bare, capsys):
    arguments = [f"model.path={bare}", f"document.ids_path={ids_file([1] * 9000)}"]
    says(refused(*arguments), "9000", "8192", "9131", "model.allow_beyond_limit=true")
    # allowed, it goes on to the weights, which these tests do not let it read
    assert COMMAND.main([*arguments, "model.allow_beyond_limit=true"]) == 1
    assert "went on" in capsys.readouterr().err


# -- models ----------------------------------------------------------------------------------


@pytest.fixture
def model_copy(tmp_path, chat):
    """A copy of the model that may be broken."""
    return Path(shutil.copytree(chat, tmp_path / "model"))


def ask(model) -> list[str]:
    return [f"model.path={model}", "document.text=a text", QUESTION]


def test_no_model(refused, tmp_path):
    says(refused("document.text=a", QUESTION), "model.path", "missing")
    says(refused(*ask("")), "model.path", "missing")
    says(refused(*ask("/no/such/folder")), "model.path=/no/such/folder", "no such")
    says(refused(*ask(tmp_path)), f"model.path={tmp_path}", "no config.json")
    (tmp_path / "model.bin").write_text("x")
    says(refused(*ask(tmp_path / "model.bin")), "a file must be a .gguf")
    (tmp_path / "model.gguf").write_text("x")
    says(refused(*ask(tmp_path / "model.gguf")), "model.gguf", "unusable")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"model_type": 5}', "\0"])
def test_config_json_that_is_none(refused, model_copy, content):
    (model_copy / "config.json").write_text(content)
    says(refused(*ask(model_copy)), f"model.path={model_copy}")


REFUSED = {
    "bloom": "ALiBi",
    "falcon": "its own code",
    "gemma3": "multimodal",
    "gemma3n_text": "shares KV",
    "gpt2": "not shown to be exact",
    "gptj": "its own code",
    "jamba": "recurrent",
    "llama4_text": "chunked masks",
    "llava": "multimodal",
    "mamba": "recurrent",
    "mpt": "ALiBi",
    "qwen3_next": "recurrent",
    "t5": "encoder and a decoder",
}


@pytest.mark.parametrize("family", REFUSED)
def test_family_that_is_not_supported(refused, tmp_path, family):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    started = time.monotonic()
    line = refused(*ask(tmp_path))
    says(line, repr(family), "not supported", REFUSED[family], "llama, mistral, mixtral")
    assert time.monotonic() - started < 5


def test_family_that_nobody_knows(refused, model_copy):
    (model_copy / "config.json").write_text('{"model_type": "nonesuch"}')
    says(refused(*ask(model_copy)), "nonesuch")


def with_rope(model, **rope):
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    (model / "config.json").write_text(json.dumps(config))


def test_rope_that_is_not_known(refused, model_copy):
    with_rope(model_copy, rope_type="proportional", factor=2.0)
    says(refused(*ask(model_copy)), "'proportional'", "not supported", "yarn")


def test_answer_that_crosses_where_rope_changes(refused, tmp_path):
    """The model's own rope has two sets of frequencies, for texts up to 80 positions and longer."""
    folder = tiny_folder("phi3", **LONGROPE)
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps({"context_ids": [1] * 60, "query_ids": [2] * 9}))
    asked = [f"model.path={folder}", f"document.ids_path={ids}"]
    line = refused(*asked, "generation.max_new_tokens=13")
    says(line, "generation.max_new_tokens=13", "longrope", "allowed: up to 12")


def test_tokenizer_that_is_damaged(refused, model_copy):
    (model_copy / "tokenizer.json").write_text("{")
    says(refused(*ask(model_copy)), "model.path", "tokenizer")


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "corrupted", "index"])
@pytest.mark.parametrize("start", [[], ["launch.nproc=2"]])
def test_damaged_weights(refused, model_copy, damage, start):
    weights = model_copy / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    elif damage == "index":
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
        weights.rename(model_copy / "model-1.safetensors")
    else:
        damaged = {
            "empty": b"",
            "truncated": whole[: len(whole) // 2],
            "corrupted": b"\xff" * 64 + whole[64:],
        }
        weights.write_bytes(damaged[damage])
    line = refused(*ask(model_copy), *start)
    says(line, f"model.path={model_copy}", "safetensors")
    if damage == "index":
        says(line, "model-2.safetensors")


# -- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("nonsense", ["nonsense", "KEY=VALUE"]),
        ("--verbose", ["--verbose", "KEY=VALUE"]),
        ("=x", ["KEY=VALUE"]),
        ("nonsense=1", ["nonsense=1", "unknown option"]),
        ("quesion=Who?", ["did you mean question?"]),
        ("strategy.layuot=zigzag", ["strategy.layuot=zigzag", "did you mean strategy.layout?"]),
        ("transprt.timeout_s=3", ["did you mean transport.timeout_s?"]),
        ("stratgy=ring", ["did you mean strategy?"]),
        ("strategy=rign", ["strategy=rign", "did you mean ring?", "dense, ring, star"]),
        ("transport=glooo", ["did you mean gloo?", "auto, gloo, nccl, threads"]),
        ("kernel=tritn", ["kernel=tritn", "did you mean triton?"]),
        ("model=smollm", ["did you mean smollm2?"]),
        ("experiment=lapttop", ["did you mean laptop?"]),
        ("strategy=", ["strategy=", "allowed"]),
        ("strategy=Ring", ["strategy=Ring", "allowed"]),
        ("strategy.layout=zag", ["strategy.layout=zag", "zigzag, striped, contiguous"]),
        ("strategy.name=ring", ["strategy.name=ring", "unknown option"]),
        ("strategy.past_by=x", ["strategy.past_by=x", "auto, kv, queries"]),
        ("model.dtype=float8", ["model.dtype=float8", "bfloat16"]),
        ("model.dtype=null", ["model.dtype=null"]),
        ("model.allow_beyond_limit=perhaps", ["model.allow_beyond_limit=perhaps", "bool"]),
        ("+generation.beams=2", ["+generation.beams=2", "cannot be added"]),
        ("~question", ["~question", "KEY=VALUE"]),
        ("~question=", ["~question=", "cannot be added or removed"]),
        ("hydra.verbose=true", ["hydra.verbose=true", "unknown option"]),
        ("generation={top_p: 1}", ["generation={top_p: 1}", "unknown option"]),
        ("generation.top_p@x=1", ["unknown option", "did you mean generation.top_p?"]),
        ("generation.top_p=${generation.seed", ["generation.top_p=${generation.seed"]),
        ("generation.max_new_tokens=${oc.env:HOME}", ["generation.max_new_tokens"]),
        ("generation.max_new_tokens=1,2", ["generation.max_new_tokens=1,2", "one value"]),
        ("generation.max_new_tokens=[1]", ["generation.max_new_tokens=[1]"]),
        ("generation.stop=", ["generation.stop", "cannot be empty"]),
        ("launch.report=5", ["launch.report=5", "launcher"]),
    ],
)
def test_unknown_or_misspelt_option(refused, chat, argument, parts):
    own = [] if argument.startswith("ques") else [QUESTION]
    says(refused(f"model.path={chat}", "document.text=a", *own, argument), *parts)


def test_option_of_another_strategy(refused):
    says(refused("strategy=dense", "strategy.layout=zigzag"), "strategy=dense has no such option")


def test_option_given_twice(refused):
    says(refused("generation.seed=1", "generation.seed=2"), "generation.seed=2", "twice")
    says(refused("strategy=ring", "strategy=dense"), "strategy=dense", "twice")


@pytest.mark.parametrize(
    "key",
    [
        "transport.world_size",
        "transport.timeout_s",
        "model.ff_slice_tokens",
        "encode.chunk_tokens",
        "generation.max_new_tokens",
        "launch.nproc",
    ],
)
@pytest.mark.parametrize("value", ["0", "-1", "many", "nan", "inf", "-inf", "", "1e400", "true"])
def test_sizes_that_are_none(refused, chat, key, value):
    line = refused(f"model.path={chat}", "document.text=a", QUESTION, f"{key}={value}")
    says(line, f"{key}=" if value else key)


@pytest.mark.parametrize("value", ["1.5", "1e99"])
@pytest.mark.parametrize("key", ["encode.chunk_tokens", "launch.nproc", "generation.seed"])
def test_integers_that_are_none(refused, chat, key, value):
    says(refused(*ask(chat), f"{key}={value}"), f"{key}=")


@pytest.mark.parametrize(
    "argument",
    [
        "generation.top_p=7",
        "generation.top_p=0",
        "generation.top_p=-0.5",
        "generation.top_p=nan",
        "generation.top_p=most",
        "generation.temperature=-1",
        "generation.temperature=nan",
        "generation.temperature=inf",
        "generation.temperature=hot",
        "generation.seed=99999999999999999999999",
        "generation.seed=x",
        "transport.timeout_s=1e300",
    ],
)
def test_numbers_out_of_range(refused, chat, argument):
    says(refused(*ask(chat), argument), argument.partition("=")[0])


# -- ranks, transports, kernels ----------------------------------------------------------------


def test_more_ranks_than_gpus(refused, monkeypatch, chat):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = refused(*ask(chat), "transport=nccl", "launch.nproc=2")
    says(line, "transport=nccl", "needs GPUs", "gloo")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    line = refused(*ask(chat), "transport=nccl", "launch.nproc=3")
    says(line, "transport=nccl", "3 ranks", "2 GPUs")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    says(refused(*ask(chat), "transport=nccl"), "4 ranks", "2 GPUs")


def test_transport_without_ranks(refused, chat):
    for name in ("gloo", "nccl"):
        says(refused(*ask(chat), f"transport={name}"), f"transport={name}", "launch.nproc=N")


def test_sizes_that_disagree(refused, monkeypatch, chat):
    line = refused(*ask(chat), "launch.nproc=2", "transport.world_size=3")
    says(line, "transport.world_size=3", "launch.nproc is 2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    line = refused(*ask(chat), "transport.world_size=3")
    says(line, "transport.world_size=3", "torchrun started 4")
    line = refused(*ask(chat), "launch.nproc=2")
    says(line, "launch.nproc=2", "torchrun started 4")
    says(refused(*ask(chat), "transport=threads"), "transport=threads", "torchrun")


def test_dense_is_for_one_rank(refused, monkeypatch, chat):
    line = refused(*ask(chat), "strategy=dense", "launch.nproc=2")
    says(line, "strategy=dense", "one rank, not 2")
    line = refused(*ask(chat), "strategy=dense", "transport=threads", "transport.world_size=3")
    says(line, "strategy=dense", "one rank, not 3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    says(refused(*ask(chat), "strategy=dense"), "strategy=dense", "one rank, not 4")


STAR_SIZES = [
    ("strategy.block_size=0", "allowed: a number of tokens above 0, as 4096 or 4K"),
    ("strategy.block_size=-5", "allowed: a number of tokens above 0"),
    ("strategy.block_size=4KB", "allowed: a number of tokens above 0"),
    ("strategy.block_size=1.5", "incompatible"),
    ("strategy.block_size=true", "incompatible"),
    ("strategy.anchor_size=-1", "or 0 for no anchor"),
    ("strategy.anchor_size=many", "or 0 for no anchor"),
    ("strategy.anchor_size=60", "is more than a block's 25 tokens"),
    ("strategy.share_anchor=all", "allowed: auto, world, rank, none"),
    ("strategy.anchor_content=last", "first, previous, shuffled, random, constant"),
    ("strategy.anchor_positions=next", "allowed: own, previous, random"),
    ("strategy.anchor_token=5", "with strategy.anchor_content=constant"),
    ("strategy.anchor_seed=x", "strategy.anchor_seed"),
]


@pytest.mark.parametrize(("argument", "why"), STAR_SIZES)
def test_star_settings_that_are_none(refused, bare, ids_file, argument, why):
    given = (f"model.path={bare}", f"document.ids_path={ids_file([5] * 97)}")
    line = refused(*given, "strategy=star", "launch.nproc=4", argument)
    says(line, argument.partition("=")[0], why)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["strategy.block_size=10", "strategy.anchor_size=11"],
            ["strategy.anchor_size=11", "at most strategy.block_size=10"],
        ),
        (
            ["strategy.share_anchor=world", "strategy.anchor_content=previous"],
            ["strategy.share_anchor=world", "gives each block its own", "allowed: none, auto"],
        ),
        (
            ["strategy.share_anchor=rank", "strategy.anchor_positions=random"],
            ["strategy.share_anchor=rank", "anchor_positions=random"],
        ),
        (
            ["strategy.anchor_content=constant", "strategy.anchor_token=97"],
            ["strategy.anchor_token=97", "must be from 0 to 96"],
        ),
    ],
)
def test_star_settings_that_do_not_fit_together(refused, bare, ids_file, arguments, parts):
    given = (f"model.path={bare}", f"document.ids_path={ids_file([5] * 97)}")
    says(refused(*given, "strategy=star", *arguments), *parts)


@pytest.mark.parametrize("name", ["book.txt", "./folder/../book.txt"])
def test_no_result_takes_the_place_of_an_input(refused, chat, tmp_path, name):
    book = tmp_path / "book.txt"
    book.write_text("The ship left.")
    (tmp_path / "folder").mkdir()
    asked = [f"model.path={chat}", f"document.path={book}", "question=Who?"]
    for key in ("output.path", "output.first_logits"):
        line = refused(*asked, f"{key}={tmp_path}/{name}")
        says(line, f"{key}=", "is document.path too, which would be overwritten")
    config = book.rename(tmp_path / "r.config.yaml")
    line = refused(asked[0], f"document.path={config}", asked[2], f"output.path={tmp_path}/r.json")
    says(line, "r.config.yaml", "is document.path too")


def test_star_blocks_that_were_meant_in_thousands(refused, bare, ids_file):
    given = (f"model.path={bare}", f"document.ids_path={ids_file([5] * 8000)}")
    line = refused(*given, "strategy=star", "strategy.block_size=4")
    says(line, "strategy.block_size=4", "2,000 blocks of 8,000 tokens", "did you mean 4K?")


def test_star_with_sliding_windows(refused, ids_file):
    folder = tiny_folder("mistral", sliding_window=100)
    given = (f"model.path={folder}", "strategy=star", "generation.max_new_tokens=1")
    line = refused(*given, f"document.ids_path={ids_file([5] * 97)}")  # and 3 of the question
    says(line, "strategy=star", "sliding window of 100", "101 positions", "strategy=ring")


def test_simulated_ranks_are_not_started(refused, chat):
    line = refused(*ask(chat), "transport=threads", "launch.nproc=2")
    says(line, "launch.nproc=2", "transport=threads")


@pytest.mark.parametrize("start", [[], ["launch.nproc=2"], ["transport=threads"]])
def test_kernel_that_cannot_run_here(refused, monkeypatch, chat, start):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(*ask(chat), *start, "kernel=cudnn")
    says(line, "kernel=cudnn: ", "needs a CUDA device", "available: auto, ")
    assert line.count("kernel=cudnn") == 1
    line = refused(*ask(chat), *start, "kernel=triton")
    says(line, "kernel=triton: ", "needs a CUDA device")


@pytest.mark.parametrize("start", [[], ["launch.nproc=2"]])
def test_unified_max_without_a_kernel_that_has_it(refused, chat, start):
    line = refused(*ask(chat), *start, "kernel=torch", "kernel.unified_max=true")
    says(line, "kernel.unified_max=true: ", "kernel torch has none", "kernel=triton")


# -- outputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["output.path", "output.first_logits"])
@pytest.mark.parametrize("start", [[], ["launch.nproc=2"]])
def test_output_that_cannot_be_written(refused, tmp_path, chat, key, start):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    for name, why in {
        "": "not a folder",
        "none/result.json": "no such file",
        "file/result.json": "cannot be written",
        "n" * 300: "too long",
        "fifo": "not a regular file",
    }.items():
        line = refused(*ask(chat), *start, f"{key}={tmp_path}/{name}")
        says(line, f"{key}=", why)
    says(refused(*ask(chat), f"{key}="), key)
    says(refused(*ask(chat), f"{key}=~nobody-of-that-name/x"), key)
    says(refused(*ask(chat), f"{key}=/dev/null"), "not a regular file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "file"]  # nothing left behind


@pytest.mark.parametrize("start", [[], ["launch.nproc=2"]])
@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("document.path", "~nobody-of-that-name/x", "cannot be read"),
        ("document.path", "n" * 300, "cannot be read: file name too long"),
        ("model.path", "~nobody-of-that-name/x", "cannot be read"),
        ("model.path", "n" * 300, "cannot be read: file name too long"),
        ("document.load", "~nobody-of-that-name/x", "could not determine home"),
        ("document.save", "~nobody-of-that-name/x", "could not determine home"),
        ("cache.offload_path", "~nobody-of-that-name/x", "could not determine home"),
        ("model.cache_dir", "~nobody-of-that-name/x", "could not determine home"),
    ],
)
def test_names_that_no_file_can_have(refused, tmp_path, chat, key, value, why, start):
    given = {"model.path": chat, "document.path": __file__, key: value}
    if key == "document.load":
        del given["document.path"]
    if key == "model.cache_dir":
        given = {"model": "smollm2", "document.path": __file__, key: value}
    if key == "cache.offload_path":
        given["cache.offload"] = "disk"
    options = [f"{name}={path}" for name, path in given.items()] + [f"output.path={tmp_path}/r"]
    says(refused(*options, QUESTION, *start).lower(), f"{key}=", why)


def test_a_disk_that_is_full_or_a_stream_that_is_closed_ends_no_run():
    """Standard output on /dev/full; no standard streams at all."""
    write = "from launch.streams import print_piece as p; p('a'); p('b'); print('end')"
    run = [sys.executable, "-c", write]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            run, stdout=full, stderr=subprocess.PIPE, text=True, check=True, env=environment()
        )
    assert done.stderr == "ringstar: standard output cannot be written: no space left on device\n"
    once = write.replace("p('a'); p('b')", "p('a', kept=False)")  # nowhere else is the result
    run = [sys.executable, "-c", once]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            run, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment()
        )
    assert done.returncode and "Fault: standard output cannot be written" in done.stderr
    closed = (
        "import os, sys; sys.stdin = sys.stdout = sys.stderr = None;"
        "from launch.streams import open_streams; open_streams();"
        "assert sys.stdin.read() == '' and not sys.stdout.isatty(); print('x', file=sys.stderr)"
    )
    subprocess.run([sys.executable, "-c", closed], check=True, env=environment())


def test_a_folder_that_may_not_be_entered_is_named(refused, tmp_path, book, monkeypatch):
    exists, folder = Path.exists, tmp_path / "private"
    folder.mkdir()

    def denied(path, **options):
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", denied)
    line = refused(f"model.path={folder}", f"document.path={book}", QUESTION)
    says(line, f"model.path={folder}: cannot be read: permission denied")


def test_pipes_are_no_files_of_several_ranks(refused, tmp_path, chat, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr("launch.inputs.under_torchrun", lambda: True)
    for path, what in ((pipe, "a pipe"), ("-", "standard input")):
        line = refused(f"model.path={chat}", f"document.path={path}", QUESTION)
        says(line, f"document.path={path}: ranks cannot share {what}; use launch.nproc")


def test_what_came_through_a_pipe_is_named_as_it_was_given(refused, chat, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"{")))
    line = refused(f"model.path={chat}", "document.ids_path=-", "launch.nproc=2")
    assert line.startswith("document.ids_path=-: ")


def test_a_folder_of_the_users_that_is_named_like_ours_is_no_matter(tmp_path):
    (tmp_path / "configs").mkdir()
    done = python("-m", "launch.generate", "model.path=none", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("ringstar: model.path=none: no such file or folder\n")


def test_a_command_that_is_written_as_an_argument_is_none(tmp_path):
    done = python("-m", "launch", "generate", "question=Who?", cwd=tmp_path)
    assert done.returncode == 2
    says(done.stderr, "generate: give a command as python -m launch.NAME")
    assert python("-m", "launch", "--help", cwd=tmp_path, check=True).stderr == ""


def test_the_demo_leaves_star_out_where_a_window_would_hide_the_text(monkeypatch):
    windowed, whole = (
        find_model(ModelConfig(path=tiny_folder(family))) for family in ("mixtral", "llama")
    )
    names = [
        [each.name for each in launch.demo._strategies(RingConfig(), files)]
        for files in (windowed, whole)
    ]
    assert names == [["ring"], ["ring", "star"]]
    assert "sliding window of 21 tokens hides part" in str(launch.demo._why_no_star(windowed))


def test_the_demo_shows_brackets_as_they_are():
    want = PlainAnswer([1], torch.ones(2), 0.1, 0.1)
    told = launch.demo._told({"ids": [2], "text": " list[int] [/y]"}, want, torch.ones(2))
    assert told.plain.startswith("list[int] [/y]\n")


def test_the_demo_has_its_own_document(capsys):
    for argument in ("document.path=x", "question=Who?", "output.path=r", "generation.seed=1"):
        assert launch.demo.main([argument]) == 2
        assert "the demo has its own" in capsys.readouterr().err
    assert launch.demo.main(["transport=threads"]) == 2
    assert "ranks are processes" in capsys.readouterr().err


def test_outputs_that_would_overwrite_each_other(refused, tmp_path, chat):
    both = [f"output.path={tmp_path}/r", f"output.first_logits={tmp_path}/./r"]
    says(refused(*ask(chat), *both), "output.first_logits")


def test_config_that_cannot_be_written_beside_the_result(refused, tmp_path, chat):
    (tmp_path / "r.config.yaml").mkdir()
    says(refused(*ask(chat), f"output.path={tmp_path}/r.json"), "r.config.yaml")


# -- real processes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["document.path=/none", QUESTION, "launch.nproc=2"], "document.path=/none"),
        (["document.text=a", QUESTION, "kernel=cudnn"], "kernel=cudnn"),
    ],
)
def test_real_process(chat, arguments, part):
    if "cudnn" in part and torch.cuda.is_available():
        pytest.skip("it may run here")
    done = python("-m", "launch.generate", f"model.path={chat}", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    says(done.stderr, "ringstar: ", part)
