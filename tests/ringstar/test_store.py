"""python -m pytest tests/ringstar/test_store.py

Documents on disk: the same answers after loading, at any number of ranks; whatever is damaged,
foreign or unfinished is refused in one line.
"""

import ast
import errno
import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ringstar.store.write
from ringstar import LongContext, UserError
from ringstar.config import RopeConfig, StarConfig
from ringstar.store import check_place, fingerprint
from ringstar.store import manifest as manifests
from seqpar.process import ProcessWorld
from tests.support.commands import python
from tests.support.models import DYNAMIC, LONGROPE, expected, over_bound, random_ids, tiny_folder
from tests.support.ranks import in_processes
from tests.support.runtime import simulated

DOCUMENT, QUESTION, NEW = 101, 9, 16
ROOT = Path(__file__).parents[2]
CASES = {
    "llama": ("llama", {}),
    "gemma2": ("gemma2", {}),
    "mixtral": ("mixtral", {}),
    "gpt_oss": ("gpt_oss", {}),
    "llama dynamic": ("llama", DYNAMIC),
    "phi3 longrope": ("phi3", LONGROPE),
}


def runtime(folder, world=2, layout="zigzag", **options):
    return simulated(folder, world, layout=layout, **options)


def encoded(ring, tokens=DOCUMENT, **options):
    return ring.encode(random_ids(tokens), length=tokens + QUESTION, **options)


def asked(ring, document, new=NEW):
    return ring.ask(document, random_ids(QUESTION), max_new_tokens=new)


@pytest.fixture
def saved(tmp_path):
    """A tiny llama's document, saved by two ranks."""
    ring = runtime(tiny_folder("llama"))
    folder = tmp_path / "my document"  # a path with a space
    ring.save(encoded(ring), str(folder))
    return folder


# --- the same as encoded anew


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
def test_loaded_at_another_world_size_and_layout(name, layout, tmp_path):
    family, changes = CASES[name]
    folder = tiny_folder(family, **changes)
    beyond = {"allow_beyond_limit": True} if changes is DYNAMIC else {}
    ring = runtime(folder, 3, chunk_tokens=13, **beyond)
    document = encoded(ring)
    ring.save(document, str(tmp_path))
    want = expected(folder, random_ids(DOCUMENT) + random_ids(QUESTION), NEW)
    for world in (1, 2, 3, 5):
        other = runtime(folder, world, layout, **beyond)
        loaded = other.load(str(tmp_path))
        answer = asked(other, loaded)
        assert over_bound(answer.first_logits, want) <= 1
        assert answer.ids == want.ids
        assert loaded.tokens == DOCUMENT and loaded.ids == random_ids(DOCUMENT)
        assert sum(loaded.metrics.kv_bytes) == sum(document.metrics.kv_bytes)
        if world == 3:
            assert torch.equal(answer.first_logits, asked(ring, document).first_logits)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_documents_with_fewer_tokens_than_ranks(tokens, tmp_path):
    folder = tiny_folder("gemma2")
    for save, load in ((5, 2), (2, 5), (1, 5)):
        ring, other = runtime(folder, save), runtime(folder, load)
        document = encoded(ring, tokens)
        ring.save(document, str(tmp_path))
        want, got = asked(ring, document), asked(other, other.load(str(tmp_path)))
        assert got.ids == want.ids
        assert torch.allclose(got.first_logits, want.first_logits, rtol=1e-4, atol=1e-4)


def test_a_loaded_document_can_be_saved_again(saved, tmp_path):
    ring = runtime(tiny_folder("llama"), 3)
    ring.save(ring.load(str(saved)), str(tmp_path / "again"))
    want = asked(ring, ring.load(str(saved)))
    other = runtime(tiny_folder("llama"), 2)
    again = asked(other, other.load(str(tmp_path / "again")))
    assert again.ids == want.ids


def test_star_documents_keep_what_they_are(tmp_path):
    strategy = StarConfig(block_size=30, anchor_size=10)
    star = runtime(tiny_folder("llama"), 2, strategy=strategy)
    document = star.encode(random_ids(DOCUMENT))
    star.save(document, str(tmp_path))
    for world in (2, 3):
        ring = runtime(tiny_folder("llama"), world)
        loaded = ring.load(str(tmp_path))
        assert loaded.strategy == strategy
        got, want = asked(ring, loaded), asked(star, document)
        assert got.ids == want.ids
        assert torch.allclose(got.first_logits, want.first_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_come_back_as_they_were(dtype, tmp_path):
    ring = runtime(tiny_folder("gemma2"), 2, dtype=dtype)
    document = encoded(ring)
    ring.save(document, str(tmp_path))
    got, want = asked(ring, ring.load(str(tmp_path))), asked(ring, document)
    assert torch.equal(got.first_logits, want.first_logits)


def test_a_question_leaves_nothing_in_what_is_saved(saved, tmp_path):
    ring = runtime(tiny_folder("llama"))
    document = encoded(ring)
    asked(ring, document)
    ring.save(document, str(tmp_path / "asked"))
    sizes = [sorted(p.stat().st_size for p in f.glob("data-*/*")) for f in tmp_path.iterdir()]
    assert sizes[0] == sizes[1]


def rank_saves(transport, folder, to):
    ring = LongContext.from_pretrained(folder, transport=ProcessWorld(transport))
    ring.save(encoded(ring), to)


def rank_loads(transport, folder, source):
    ring = LongContext.from_pretrained(folder, transport=ProcessWorld(transport))
    with pytest.raises(UserError, match="holds no saved document"):
        ring.load(f"{source}/nothing")  # and the ranks go on
    return asked(ring, ring.load(source)).ids


@pytest.mark.slow
def test_processes_save_and_load(tmp_path):
    folder = tiny_folder("gemma2")
    in_processes(2, rank_saves, folder, str(tmp_path / "a"))
    want = expected(folder, random_ids(DOCUMENT) + random_ids(QUESTION), NEW).ids
    assert in_processes(3, rank_loads, folder, str(tmp_path / "a")) == [want] * 3


# --- refused


def reload(folder, **options):
    ring = runtime(tiny_folder("llama"), 2, **options)
    return asked(ring, ring.load(str(folder)), 2).ids


def test_any_flipped_byte_and_any_truncation_is_refused(saved):
    ring = runtime(tiny_folder("llama"), 3)
    files = [saved / manifests.NAME, *sorted(saved.glob("data-*/*"))]
    assert len(files) == 3
    rng = random.Random(0)
    for trial in range(100):
        file = rng.choice(files)
        whole = file.read_bytes()
        at = rng.randrange(len(whole))
        cut = trial % 3 == 0
        spoilt = whole[:at] if cut else whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))])
        file.write_bytes(spoilt if cut else spoilt + whole[at + 1 :])
        with pytest.raises(UserError, match=r"document\.load=.*(damaged|newer|holds no saved)"):
            ring.load(str(saved))
        file.write_bytes(whole)
    assert ring.load(str(saved)).tokens == DOCUMENT


def rewritten(folder, **changes):
    """A manifest with other content, whose checksum is right."""
    file = folder / manifests.NAME
    body = json.loads(file.read_bytes()) | changes
    body.pop("sha256")
    file.write_text(json.dumps({**body, "sha256": manifests._checksum(body)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "written by a newer ringstar, in format 3, not 2"),
        ({"format": "a cake"}, "it is not that of a ringstar document"),
        ({"data": "../elsewhere"}, "it names the folder '../elsewhere'"),
        ({"data": "/etc"}, "it names the folder '/etc'"),
        ({"parts": []}, "its length is not that of its tokens"),
        ({"files": []}, "its ranks do not agree"),
        ({"stop": 5}, "its tokens are not those of its ranks"),
        ({"stop": 0}, "its tokens are not those of its ranks"),
        ({"length": 3}, "its length is not that of its tokens"),
        ({"owned": [[[0, 101, 0]], []]}, "its positions are not such"),
        ({"dtype": "bfloat16"}, "was encoded with another dtype: bfloat16, here float32"),
        ({"rope": "float64"}, "was encoded with another rope: float64, here float32"),
        ({"strategy": {"name": "moon"}}, "unknown strategy"),
        ({"strategy": {"name": "ring", "speed": 3}}, "unknown strategy"),
        ({"layers": [[None, [0, 1, 2]]]}, "does not hold what the manifest says"),
        ({"layers": [[5, [0, 1]]]}, "does not hold what the manifest says"),
    ],
)
def test_manifests_of_something_else_are_refused(changes, message, saved):
    (part,) = json.loads((saved / manifests.NAME).read_bytes())["parts"]
    of_part = {key: changes.pop(key) for key in set(changes) & {"stop", "owned", "files"}}
    rewritten(saved, **({"parts": [{**part, **of_part}]} if of_part else {}), **changes)
    with pytest.raises(UserError, match=r"document\.load=.*" + message):
        reload(saved)


def test_the_format_before_had_no_form_of_kv(saved):
    file = saved / manifests.NAME
    body = json.loads(file.read_bytes())
    del body["kv"]
    file.write_text(json.dumps(body))
    rewritten(saved, version=1)
    assert len(reload(saved)) == 2


def test_a_length_claimed_in_a_header_is_not_believed(saved):
    """The checksum is made right, as a forger would."""
    file = next(saved.glob("data-*/*rank-00001*"))
    forged = (10 << 30).to_bytes(8, "little") + file.read_bytes()[8:]
    file.write_bytes(forged)
    body = json.loads((saved / manifests.NAME).read_bytes())
    body["parts"][0]["files"][1] = list(ringstar.store.read._checksum(file))
    rewritten(saved, parts=body["parts"])
    with pytest.raises(UserError, match="does not hold what the manifest says"):
        reload(saved)


def test_a_missing_file_is_named(saved):
    next(saved.glob("data-*/*rank-00001*")).unlink()
    with pytest.raises(UserError, match=r"damaged: data-\w+/part-00000-rank-00001\.saf"):
        reload(saved)


def test_what_is_no_document_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no saved document: there is no manifest\.json"):
        reload(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no saved document"):
        reload(tmp_path)
    (tmp_path / manifests.NAME).write_text("[]")
    with pytest.raises(UserError, match="it is not that of a ringstar document"):
        reload(tmp_path)
    (tmp_path / manifests.NAME).write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match=r"damaged manifest\.json"):
        reload(tmp_path)


def test_another_model_is_refused(saved):
    for folder, what in (
        (tiny_folder("qwen3"), "another model: llama, here qwen3"),
        (tiny_folder("llama", rms_norm_eps=1e-4), r"another model \(weights or config\)"),
    ):
        with pytest.raises(UserError, match=what):
            runtime(folder).load(str(saved))


def test_other_weights_of_the_same_shape_are_refused(saved, tmp_path):
    folder = tmp_path / "tuned"
    shutil.copytree(tiny_folder("llama"), folder)
    ring = runtime(str(folder))
    with torch.no_grad():
        ring.group.engines[0].model.model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(UserError, match=r"another model \(weights or config\)"):
        ring.load(str(saved))


def test_other_settings_are_refused(saved):
    for options, what in (
        ({"dtype": "bfloat16"}, "another dtype: float32, here bfloat16"),
        ({"rope": RopeConfig("float64")}, "another rope: float32, here float64"),
        (
            {"rope": RopeConfig(scaling="yarn", factor=2.0)},
            "here float32, yarn",
        ),
    ):
        with pytest.raises(UserError, match=what):
            runtime(tiny_folder("llama"), **options).load(str(saved))


def test_nothing_is_pickled():
    for file in (ROOT / "ringstar").rglob("*.py"):
        names = {
            node.id for node in ast.walk(ast.parse(file.read_text())) if type(node) is ast.Name
        }
        assert not names & {"pickle", "marshal", "shelve"}, file


# --- saving goes wrong


def intact(folder, tokens):
    ring = runtime(tiny_folder("llama"), 1)
    assert ring.load(str(folder)).tokens == tokens
    assert len(list(folder.glob("data-*"))) == 1
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_a_full_disk_leaves_the_old_copy(saved, monkeypatch):
    ring = runtime(tiny_folder("llama"))
    other = encoded(ring, 55)
    usage = shutil._ntuple_diskusage(10**9, 10**9, 999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"no space left on device; 1,\d\d\d,\d\d\d bytes are need"):
        ring.save(other, str(saved))
    monkeypatch.undo()
    intact(saved, DOCUMENT)


@pytest.mark.parametrize("call", range(5))
def test_a_disk_that_fills_up_meanwhile_leaves_the_old_copy(call, saved, monkeypatch):
    """Each `fsync` in turn fails: of two ranks' files, their folder, the manifest, its name."""
    ring = runtime(tiny_folder("llama"))
    other, right, calls = encoded(ring, 55), os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == call + 1:
            raise OSError(errno.ENOSPC, "")
        return right(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=r"no space left on device; .* bytes are needed"):
        ring.save(other, str(saved))
    monkeypatch.undo()
    if call < 4:
        intact(saved, DOCUMENT)
    else:  # replaced, and not known to be on the disk: what either manifest names is there
        assert ring.load(str(saved)).tokens == 55
        assert len(list(saved.glob("data-*"))) == 2
    ring.save(other, str(saved))
    intact(saved, 55)


def test_a_first_save_that_was_killed_is_in_nobodys_way(tmp_path):
    """What it left: a folder of data, and half a manifest."""
    (tmp_path / "data-0123456789abcdef").mkdir()
    (tmp_path / ".ringstar-0123").write_text("{")
    ring = runtime(tiny_folder("llama"))
    ring.save(encoded(ring), str(tmp_path))
    intact(tmp_path, DOCUMENT)


def test_ranks_may_look_at_a_place_together(tmp_path):
    """None of them takes what another makes for somebody else's; nothing stays."""
    (tmp_path / "there").mkdir()
    for name in ("there", "new", "new/deeper"):
        with ThreadPoolExecutor(8) as ranks:
            look = partial(check_place, "document.save")
            list(ranks.map(look, [str(tmp_path / name)] * 200))
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_other_folders_are_left_alone(tmp_path):
    ring = runtime(tiny_folder("llama"))
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is a folder that holds other things"):
        ring.save(encoded(ring), str(tmp_path))
    with pytest.raises(UserError, match=r"document\.save=.*letter\.txt: "):
        ring.save(encoded(ring), str(tmp_path / "letter.txt"))
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("other", ['{"name": "an app"}', "[]", "no JSON"])
def test_a_manifest_of_something_else_is_left_alone(tmp_path, other):
    ring, manifest = runtime(tiny_folder("llama")), tmp_path / "manifest.json"
    manifest.write_text(other)
    with pytest.raises(UserError, match="is a folder that holds other things"):
        ring.save(encoded(ring), str(tmp_path))
    with pytest.raises(UserError, match="is a folder that holds other things"):
        check_place("document.save", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]
    assert manifest.read_text() == other
    manifest.unlink()
    ring.save(encoded(ring), str(tmp_path))
    manifest.write_text(other)  # damaged: the data are still beside it
    if other == "no JSON":
        ring.save(encoded(ring), str(tmp_path))
        assert ring.load(str(tmp_path)).tokens


def test_buffers_that_are_saved_are_weights():
    """Some quantisers keep theirs in buffers."""

    class Layer(torch.nn.Module):
        def __init__(self, packed, inverse):
            super().__init__()
            self.config = SimpleNamespace(to_dict=dict)
            self.register_buffer("qweight", torch.tensor(packed))
            self.register_buffer("inv_freq", torch.tensor(inverse), persistent=False)

    ours = fingerprint(Layer([1, 2], 1.0))
    assert ours == fingerprint(Layer([1, 2], 2.0)) != fingerprint(Layer([1, 3], 1.0))


KILLED = """
import os, random, signal, sys, time
import torch
from ringstar import LongContext
torch.set_num_threads(1)
model, folder, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])

def runtime(world):
    return LongContext.from_pretrained(
        model, transport="threads", world_size=world, threads_per_rank=1
    )

ring = runtime(2)
documents = {n: ring.encode(list(range(n))) for n in (40, 60)}
started = time.perf_counter()
ring.save(documents[40], folder)
typical = time.perf_counter() - started
rng, reported = random.Random(1), 40
for number in range(rounds):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        for n in (60, 40) * 50:
            ring.save(documents[n], folder)
            os.write(write, bytes([n]))
    os.close(write)
    time.sleep(rng.uniform(0.0, 3 * typical))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = os.read(read, 10000)
    os.close(read)
    reported = said[-1] if said else reported
    after = 40 if reported == 60 else 60
    if not said:
        after = 60
    found = runtime(1 + number % 3).load(folder).tokens
    assert found in (reported, after), (number, found, reported)
    reported = found
ring.save(documents[40], folder)
print(rounds, len(os.listdir(folder)))
"""


@pytest.mark.slow
def test_nothing_that_was_saved_is_lost_to_kill_9(tmp_path):
    """`python -c KILLED MODEL FOLDER 200` is the long form."""
    run = python("-c", KILLED, tiny_folder("llama"), str(tmp_path / "d"), "40")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["40", "2"]
