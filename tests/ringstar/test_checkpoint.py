"""python -m pytest tests/ringstar/test_checkpoint.py

Encodes that survive: stopped anywhere, taken up by any number of ranks, the same in the end.
"""

import fcntl
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from ringstar import LongContext, UserError, kept
from ringstar.config import RingConfig, StarConfig
from seqpar.process import ProcessWorld
from tests.support.commands import python
from tests.support.models import DYNAMIC, LONGROPE, expected, random_ids, tiny_folder
from tests.support.ranks import in_processes
from tests.support.runtime import assert_exact, simulated

TOKENS, QUESTION, NEW = 130, random_ids(9, seed=4), 8
IDS = random_ids(TOKENS)


def runtime(folder, world=3, layout="zigzag", **options):
    options.setdefault("chunk_tokens", 7)
    return simulated(folder, world, layout=layout, **options)


def check(folder, ring, document):
    assert document.ids == IDS
    assert_exact(ring, document, folder, QUESTION, NEW)


def interrupted(ring, to, parts, every=1, length=0):
    """Encode, and stop when so many parts are on the disk."""
    with fails_after(parts, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        ring.encode_kept(IDS, str(to), every, length=length)


@contextmanager
def fails_after(parts, error):
    written, write = [], kept.write

    def stop(*arguments):
        if len(written) == parts:
            raise error
        written.append(1)
        return write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "write", stop)
        yield


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("layout", ["zigzag", "striped", "contiguous"])
def test_a_stopped_encode_goes_on_at_any_world_size(family, layout, tmp_path):
    folder, to = tiny_folder(family), tmp_path / "kept one"
    interrupted(runtime(folder, 3, layout), to, parts=2)
    assert [path.name for path in tmp_path.iterdir()] == ["kept one.unfinished"]
    interrupted(runtime(folder, 2), to, parts=1, every=2)
    ring, seen = runtime(folder, 4, layout), []
    model = ring.group.engines[0].model.model.model
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    document = ring.encode_kept(IDS, str(to), 1)
    hook.remove()
    # 2 chunks of 3 ranks, then 2 of 2, of 7 tokens each, were there; a rank may run dummies
    assert TOKENS - 70 <= sum(seen) <= TOKENS - 70 + 3 * len(seen) / 4
    check(folder, ring, document)
    assert [path.name for path in tmp_path.iterdir()] == ["kept one"]
    for world in (1, 2, 3):
        other = runtime(folder, world)
        loaded = other.load(str(to))
        assert loaded.ids == IDS
        check(folder, other, loaded)


@pytest.mark.parametrize(("family", "changes"), [("llama", DYNAMIC), ("phi3", LONGROPE)])
def test_rope_is_that_of_the_whole_text(family, changes, tmp_path):
    folder, length = tiny_folder(family, **changes), TOKENS + len(QUESTION)
    beyond = {"allow_beyond_limit": True} if changes is DYNAMIC else {}
    interrupted(runtime(folder, 3, **beyond), tmp_path / "kept", parts=2, length=length)
    ring = runtime(folder, 2, **beyond)
    check(folder, ring, ring.encode_kept(IDS, str(tmp_path / "kept"), 2, length=length))


def test_a_text_of_another_length_does_not_go_on(tmp_path):
    """Its frequencies would be others."""
    ring = runtime(tiny_folder("llama", **DYNAMIC), 2, allow_beyond_limit=True)
    interrupted(ring, tmp_path / "kept", parts=2, length=TOKENS + 5)
    with pytest.raises(
        UserError, match=f"a text of another length.*{TOKENS + 5}, here {TOKENS + 9}"
    ):
        ring.encode_kept(IDS, str(tmp_path / "kept"), 1, length=TOKENS + 9)


def test_each_part_is_written_once(tmp_path):
    ring, to = runtime(tiny_folder("llama"), 2), tmp_path / "kept"
    interrupted(ring, to, parts=4)
    (data,) = (tmp_path / "kept.unfinished").glob("data-*")
    before = {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    assert len(before) == 8
    ring.encode_kept(IDS, str(to), 1)
    after = {path.name: path.stat().st_mtime_ns for path in (to / data.name).iterdir()}
    assert before.items() <= after.items() and len(after) == 2 * -(-TOKENS // 14)
    kv = 2 * 2 * 2 * 16 * 4 * TOKENS
    assert kv < sum(path.stat().st_size for path in (to / data.name).iterdir()) < 1.6 * kv


def test_a_kept_document_makes_no_room_for_a_question_about_itself(tmp_path):
    ring = runtime(tiny_folder("llama"))
    document = ring.encode_kept(IDS, str(tmp_path / "kept"), 2)
    assert ring.shelf.victims() == [document]
    assert not ring.shelf.victims([document])
    document.pin()
    assert not ring.shelf.victims()


def test_what_was_sent_is_that_of_all_parts(tmp_path):
    ring = runtime(tiny_folder("llama"))
    before = [transport.counters.bytes_sent for transport in ring.ranks.transports]
    document = ring.encode_kept(IDS, str(tmp_path / "kept"), 1)
    after = [transport.counters.bytes_sent for transport in ring.ranks.transports]
    assert document.metrics.bytes_sent == [b - a for a, b in zip(before, after, strict=True)]
    answer = ring.ask(document, QUESTION, max_new_tokens=2)
    assert answer.metrics.bytes_sent == [t.counters.bytes_sent for t in ring.ranks.transports]


def test_progress_is_over_the_whole_and_goes_on(tmp_path):
    ring, shares = runtime(tiny_folder("llama"), 2), []
    interrupted(ring, tmp_path / "kept", parts=5)
    ring.encode_kept(IDS, str(tmp_path / "kept"), 1, shares.append)
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert shares[0] > 5 * 14 / TOKENS


def test_what_was_saved_there_before_stays_until_the_end(tmp_path):
    folder, to = tiny_folder("gemma2"), str(tmp_path / "kept")
    ring = runtime(folder)
    ring.save(ring.encode(random_ids(20)), to)
    interrupted(ring, to, parts=3)
    assert ring.load(to).tokens == 20
    check(folder, ring, ring.encode_kept(IDS, to, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    check(folder, ring, ring.load(to))


def test_one_run_at_a_time(tmp_path, caplog):
    """One that encodes is refused, one that saves waits, as long as another run is at it."""
    ring, to = runtime(tiny_folder("llama")), tmp_path / "kept"
    for place in (tmp_path / "kept.unfinished", to):
        place.mkdir()
    taken_now = r"kept\.unfinished: another run is writing to it"
    with taken(tmp_path / "kept.unfinished"), pytest.raises(UserError, match=taken_now):
        ring.encode_kept(IDS, str(to), 1)
    document = ring.encode_kept(IDS, str(to), 1)
    check(tiny_folder("llama"), ring, document)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    caplog.set_level("INFO", logger="ringstar")
    with taken(to) as handle, ThreadPoolExecutor() as pool:
        saving = pool.submit(ring.save, document, str(to))
        while "another run is saving to" not in caplog.text:
            time.sleep(0.01)
        assert not saving.done()
        fcntl.flock(handle, fcntl.LOCK_UN)
        saving.result(timeout=60)
    assert ring.load(str(to)).ids == IDS


@contextmanager
def taken(folder):
    """As another run has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def test_a_place_for_what_is_unfinished_is_looked_for_first(tmp_path):
    ring = runtime(tiny_folder("llama"))
    (tmp_path / "kept.unfinished").write_text("mine")
    with pytest.raises(UserError, match=r"document\.save=.*kept\.unfinished: not a directory"):
        ring.encode_kept(IDS, str(tmp_path / "kept"), 1)
    assert not (tmp_path / "kept").exists()


def test_what_does_not_belong_is_refused(tmp_path):
    ring, to = runtime(tiny_folder("llama")), str(tmp_path / "kept")
    with pytest.raises(UserError, match=r"document\.checkpoint_every=0: allowed: 1 or more"):
        ring.encode_kept(IDS, to, 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other things"):
        ring.encode_kept(IDS, str(tmp_path / "mine"), 1)
    interrupted(ring, to, parts=2)
    with pytest.raises(UserError, match=r"kept\.unfinished: holds the beginning of another"):
        ring.encode_kept([5, *IDS], to, 1)
    with pytest.raises(UserError, match=r"kept\.unfinished: holds the beginning of another"):
        ring.encode_kept(IDS[:10], to, 1)
    with pytest.raises(UserError, match=r"^document\.save=.*another model"):
        runtime(tiny_folder("qwen3")).encode_kept(IDS, to, 1)
    next((tmp_path / "kept.unfinished").glob("data-*/part-00001*")).unlink()
    with pytest.raises(UserError, match="damaged"):
        ring.encode_kept(IDS, to, 1)
    star = runtime(tiny_folder("llama"), strategy=StarConfig())
    with pytest.raises(UserError, match=r"document\.checkpoint_every=1: star's blocks"):
        star.encode_kept(IDS, to, 1)


def rank_encodes(transport, folder, to, fails_at):
    ring = LongContext.from_pretrained(
        folder, strategy=RingConfig(), transport=ProcessWorld(transport), chunk_tokens=7
    )
    with fails_after(fails_at, ZeroDivisionError("the end of this run")):
        document = ring.encode_kept(IDS, to, 1)
    return ring.ask(document, QUESTION, max_new_tokens=NEW).ids


@pytest.mark.slow
def test_processes_go_on_with_what_others_began(tmp_path):
    folder, to = tiny_folder("gemma2"), str(tmp_path / "kept")
    with pytest.raises(RuntimeError, match="the end of this run"):
        in_processes(3, rank_encodes, folder, to, 3)
    want = expected(folder, IDS + QUESTION, NEW).ids
    assert in_processes(2, rank_encodes, folder, to, -1) == [want] * 2


KILLED = """
import os, random, signal, sys, time
import torch
from ringstar import LongContext
torch.set_num_threads(1)
model, folder, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
ids, question = list(range(90)), [5, 6, 7]

def runtime(world):
    return LongContext.from_pretrained(
        model, transport="threads", world_size=world, threads_per_rank=1, chunk_tokens=3
    )

rings = {world: runtime(world) for world in (1, 2, 3)}
want = rings[1].ask(rings[1].encode(ids), question, max_new_tokens=8).ids
started = time.perf_counter()
rings[1].encode_kept(ids, f"{folder}-whole", 1)
longest = max(0.25, (time.perf_counter() - started) / 2)  # on a busy machine
rng, finished, kept = random.Random(2), 0, 0
for number in range(rounds):
    ring = rings[1 + number % 3]
    child = os.fork()
    if not child:
        ring.encode_kept(ids, folder, 1)
        os._exit(0)
    time.sleep(rng.uniform(0.0, longest))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    reader = rings[1 + rng.randrange(3)]
    if os.path.exists(folder):  # finished: whole, and right
        assert reader.ask(reader.load(folder), question, max_new_tokens=8).ids == want
        os.rename(folder, f"{folder}-{number}")
        finished, kept = finished + 1, 0
    elif os.path.exists(f"{folder}.unfinished/manifest.json"):
        tokens = reader.load(f"{folder}.unfinished").tokens
        assert tokens >= kept, (tokens, kept)  # nothing that was kept is lost
        kept = tokens
done = rings[2].encode_kept(ids, folder, 1)
assert rings[2].ask(done, question, max_new_tokens=8).ids == want
print(rounds, finished > 0)
"""


@pytest.mark.slow
def test_nothing_that_was_kept_is_lost_to_kill_9(tmp_path):
    """`python -c KILLED MODEL FOLDER 200` is the long form."""
    run = python("-c", KILLED, tiny_folder("gemma2"), str(tmp_path / "d"), "40")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["40", "True"]
