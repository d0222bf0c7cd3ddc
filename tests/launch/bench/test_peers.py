"""python -m pytest tests/launch/bench/test_peers.py

What is measured beside ours makes the same tokens, as many as asked for, one time for each.
"""

import importlib.machinery
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.live_bytes import LiveBytes
from launch.bench import llama, peers
from launch.bench.peer_room import batch_bytes, eager_bytes, plain_bytes
from launch.bench.peers import PEERS, Request
from ringstar.config import ModelConfig, RopeConfig
from ringstar.models import find_model
from ringstar.models.one_device import plain_model
from ringstar.models.plain_generate import PlainGenerate
from tests.support.models import expected, random_ids, tiny_folder

CPU = torch.device("cpu")
HUGGING_FACE = ("hf-eager", "hf-sdpa", "hf-batch")


def request_of(folder: str, **changes) -> Request:
    files = find_model(ModelConfig(name="hf", path=folder))
    asked = Request(files, CPU, torch.float32, 1, prompt_tokens=40, new_tokens=6, batch=3)
    return replace(asked, **changes)


def generated(name: str, request: Request, prompts: list[list[int]], new_tokens: int):
    with PEERS[name].make(request) as model:
        return model.generate(prompts, new_tokens)


def check(timed, batch: int, new_tokens: int) -> None:
    """As many tokens as asked for, and a time for each, none before the one before it."""
    assert len(timed.ids) == len(timed.token_s) == batch
    for ids, times in zip(timed.ids, timed.token_s, strict=True):
        assert len(ids) == len(times) == new_tokens
        assert timed.asked_s < times[0] and times == sorted(times)


@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_greedy_tokens_are_those_of_generate(name, family):
    folder = tiny_folder(family)
    request = request_of(folder)
    assert PEERS[name].why_not(request) is None
    prompts = [random_ids(40, seed) for seed in range(3)]
    with PEERS[name].make(request) as model:
        for _ in range(2):  # nothing stays of a call
            timed = model.generate(prompts, 6)
            check(timed, 3, 6)
            assert timed.ids == [expected(folder, prompt, 6).ids for prompt in prompts]


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_an_end_token_ends_nothing(name, tmp_path):
    prompt, plain = random_ids(40), tiny_folder("llama")
    want = expected(plain, prompt, 6).ids
    folder = shutil.copytree(plain, tmp_path / "model")
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((folder / file).read_text()) | {"eos_token_id": want[2]}
        (folder / file).write_text(json.dumps(settings))
    request = request_of(str(folder), batch=1)
    assert request.files.end_tokens() == {want[2]}
    timed = generated(name, request, [prompt], 6)
    check(timed, 1, 6)
    assert timed.ids == [want]


def test_generate_makes_logits_of_one_position():
    """On a long prompt those of all would be most of the memory."""
    request = request_of(tiny_folder("llama"), batch=1)
    model = PlainGenerate(plain_model(request.files, torch.float32, CPU, "sdpa"))
    seen = []
    model._model.lm_head.register_forward_hook(lambda *call: seen.append(call[-1].shape[1]))
    model.generate([random_ids(40)], 3)
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_table_says_what_it_is(name):
    said = PEERS[name].what(request_of(tiny_folder("llama")))
    assert "transformers 5." in said and "\n" not in said


# -- memory ----------------------------------------------------------------------------------


def test_scores_are_squares():
    config = request_of(tiny_folder("llama")).files.config
    one, two = (eager_bytes(config, torch.float32, 1, prompt, 8) for prompt in (10_000, 20_000))
    assert 3.9 < two / one < 4
    # 4 heads, a product and its scaled form, and the mask
    assert 10_000**2 * (4 * 8 + 4) < one < 1.05 * 10_000**2 * (4 * 8 + 4)
    assert eager_bytes(config, torch.bfloat16, 1, 10_000, 8) > one
    assert plain_bytes(config, torch.float32, 1, 10_000, 8) < one / 100


def test_eager_takes_about_what_is_said():
    request = request_of(tiny_folder("llama"), batch=2)
    said = eager_bytes(request.files.config, torch.float32, 2, 900, 1)
    with PEERS["hf-eager"].make(request) as model, LiveBytes() as found:
        model.generate([random_ids(900, seed) for seed in range(2)], 1)
    assert 0.8 < found.peak / said < 1.1


@pytest.mark.parametrize(
    ("name", "needed"),
    [("hf-eager", eager_bytes), ("hf-sdpa", plain_bytes), ("hf-batch", batch_bytes)],
)
def test_what_does_not_fit_is_refused_by_its_size(name, needed, monkeypatch):
    request = request_of(tiny_folder("llama"))
    weights = sum(path.stat().st_size for path in request.files.folder.glob("*.safetensors"))
    wanted = weights + needed(request.files.config, torch.float32, 3, 40, 6)
    assert weights > 100_000
    for free, fits in ((int(1.24 * wanted), False), (int(1.26 * wanted), True)):
        monkeypatch.setattr(peers, "free_memory", lambda _, free=free: free)
        why = PEERS[name].no_room(request)
        assert why is None if fits else "needs about" in why


def test_weights_count_as_they_are_loaded(tmp_path):
    """Widened ones more than their files; and those of older files too."""
    folder = Path(tiny_folder("llama"))
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    request = request_of(str(folder))
    assert peers._weights(request, own=False) == stored
    assert peers._weights(replace(request, dtype=torch.float64), own=False) == 2 * stored
    twice = shutil.copytree(folder, tmp_path / "twice")  # as whole downloads of some models are
    shutil.copy(twice / "model.safetensors", twice / "consolidated.safetensors")
    assert peers._weights(request_of(str(twice)), own=False) == stored
    older = shutil.copytree(folder, tmp_path / "older")
    for path in older.glob("*.safetensors"):
        path.rename(older / "pytorch_model.bin")
    assert peers._weights(request_of(str(older)), own=False) == stored


def test_a_form_of_attention_that_transformers_lacks_is_named():
    request = request_of(tiny_folder("gpt_oss"))
    for name in ("hf-sdpa", "hf-batch"):
        assert "no sdpa attention for gpt_oss" in PEERS[name].why_not(request)
    assert PEERS["hf-eager"].why_not(request) is None


# -- llama.cpp -------------------------------------------------------------------------------


@pytest.fixture
def smollm2() -> Request:
    files = find_model(ModelConfig(name="smollm2"))
    return Request(files, CPU, torch.float32, 1, prompt_tokens=30, new_tokens=5, batch=2)


def installed(monkeypatch, there: bool) -> None:
    """The package, whether this machine has it or not."""
    spec = importlib.machinery.ModuleSpec("llama_cpp", None) if there else None
    monkeypatch.setattr(peers, "find_spec", lambda _: spec)
    monkeypatch.setattr(llama, "weights_format", lambda _: "Q4_1")


def test_why_llama_cpp_does_not_run(monkeypatch, smollm2):
    why_not = PEERS["llama.cpp"].why_not
    installed(monkeypatch, False)
    assert "pip install llama-cpp-python" in why_not(smollm2)
    assert PEERS["llama.cpp"].what(smollm2) == "llama.cpp"
    installed(monkeypatch, True)
    assert why_not(smollm2) is None
    assert "needs a GGUF file" in why_not(request_of(tiny_folder("llama")))
    monkeypatch.setattr(llama, "runs_on_gpus", lambda: False)
    assert "DGGML_CUDA=on" in why_not(replace(smollm2, device=torch.device("cuda", 1)))

    def unreadable(_):
        raise RuntimeError("llama.cpp cannot read it")

    monkeypatch.setattr(llama, "weights_format", unreadable)
    assert why_not(smollm2) == "RuntimeError: llama.cpp cannot read it"


def test_llama_cpp_is_not_given_a_scaled_rope(monkeypatch):
    installed(monkeypatch, True)
    files = find_model(ModelConfig(name="smollm2"), RopeConfig(scaling="yarn", factor=2.0))
    request = Request(files, CPU, torch.float32, 1, prompt_tokens=30, new_tokens=5)
    assert "rope.scaling" in PEERS["llama.cpp"].why_not(request)


@pytest.mark.slow
def test_llama_cpp_reads_the_same_tokens_and_mostly_says_the_same(smollm2):
    """Its products are in 4 bits, so that tokens need not all agree."""
    pytest.importorskip("llama_cpp")
    what = PEERS["llama.cpp"].what(smollm2)
    assert "Q4_1 weights" in what and "llama-cpp-python 0." in what
    texts = [
        "The capital of France is Paris, and the capital of Italy is",
        "One, two, three, four,",
    ]
    prompts = [smollm2.files.plain_ids(text * 3)[-12:] for text in texts]
    assert len({len(prompt) for prompt in prompts}) == 1
    with PEERS["llama.cpp"].make(smollm2) as model:
        both = model.generate(prompts, 5)
        alone = [model.generate([prompt], 5).ids[0] for prompt in prompts]
    check(both, 2, 5)
    assert both.ids == alone
    plain = generated("hf-sdpa", smollm2, prompts, 5)
    same = [
        a == b for pair in zip(both.ids, plain.ids, strict=True) for a, b in zip(*pair, strict=True)
    ]
    assert sum(same) >= 8


@pytest.mark.slow
def test_llama_cpp_has_the_same_vocabulary(smollm2):
    llama_cpp = pytest.importorskip("llama_cpp")
    text = Path("README.md").read_text()[:4000]
    gguf = peers._gguf(smollm2)
    theirs = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    assert theirs.tokenize(text.encode(), add_bos=False) == smollm2.files.plain_ids(text)


@pytest.mark.slow
def test_llama_cpp_cuts_a_long_text_into_calls(smollm2, monkeypatch):
    """The same tokens whatever a call takes."""
    pytest.importorskip("llama_cpp")
    prompts = [smollm2.files.plain_ids("The ship sailed at dawn. " * 4)[:20]] * 2
    whole = generated("llama.cpp", smollm2, prompts, 5)
    monkeypatch.setattr(llama, "CALL_TOKENS", 7)
    cut = generated("llama.cpp", smollm2, prompts, 5)
    check(cut, 2, 5)
    assert cut.ids == whole.ids and cut.token_s[0] == cut.token_s[1]


@pytest.mark.slow
def test_a_file_that_llama_cpp_cannot_read_is_named(tmp_path):
    pytest.importorskip("llama_cpp")
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(RuntimeError, match=r"cannot read .*model\.gguf"):
        llama.weights_format(tmp_path / "model.gguf")
