"""python -m pytest tests/ringstar/test_harness.py

lm-eval's own tasks through the runtime, offline, against its own Hugging Face backend: the same
answers, log-likelihoods within 1e-3.
"""

import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

import lm_eval.evaluator
import nltk
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ringstar import CacheConfig, LongContext, UserError
from ringstar.config import ModelConfig, StarConfig
from ringstar.harness import RingstarLM
from ringstar.models import find_model
from tests.support.chat import LINES, chat_folder
from tests.support.lm_eval_tasks import choices, evaluated, local_task, responses, task_manager
from tests.support.models import LONGROPE, tiny_folder

BOUND = 1e-3
PAGES = [{"page": " ".join(LINES * 12)}, {"page": LINES[0]}]


@pytest.fixture(scope="module", autouse=True)
def _offline():
    """RULER's tasks look for a file of nltk that those used here do without.

    What the harness notes of the machine takes it longer than these tasks.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)
        patch.setattr(nltk, "download", lambda *_, **__: False)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The names of an own short task, one of whole texts, one of long contexts; a manager."""
    folder = tmp_path_factory.mktemp("tasks")
    short = local_task(folder, "arc/arc_easy.yaml", choices(4))
    rolling = local_task(folder, "wikitext/wikitext.yaml", PAGES)

    def manager(pretrained: str, tokens: int) -> TaskManager:
        metadata = {"pretrained": pretrained, "max_seq_lengths": [tokens]}
        return task_manager([folder], ["ruler"], metadata)

    return SimpleNamespace(short=short, rolling=rolling, long="niah_single_1", manager=manager)


def ours(folder: str, **more) -> RingstarLM:
    given = {"transport": "threads", "world_size": 2, "threads_per_rank": 1, **more}
    return RingstarLM(folder, **given)


def theirs(folder: str, **more) -> HFLM:
    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1, **more)


def assert_agree(got, want, task: str) -> None:
    """Sums within the bound, and the same verdict about greedy; of answers, the same text."""
    for mine, its in zip(responses(got)[task], responses(want)[task], strict=True):
        for (a, *_), (b, *_) in zip(mine, its, strict=True):
            if isinstance(a, str):
                assert a == b
            else:
                (a, *a_greedy), (b, *b_greedy) = (
                    x if isinstance(x, tuple) else (x,) for x in (a, b)
                )
                assert abs(a - b) < BOUND and a_greedy == b_greedy
    assert got["results"][task].keys() == want["results"][task].keys()


def test_own_tasks_agree_with_the_own_backend(tasks):
    folder = chat_folder()
    manager = tasks.manager(folder, 600)
    names = [tasks.short, tasks.rolling, tasks.long]
    more = {"gen_kwargs": {"max_gen_toks": 12, "until": ["3r3"]}}
    got, want = (
        evaluated(model, names, manager, 3, **more)
        for model in (ours(folder, max_length=640), theirs(folder, max_length=640))
    )
    for name in names:
        assert_agree(got, want, name)
    assert got["config"]["model"] == "RingstarLM"
    assert got["config"]["ranks"] == 2


def test_a_chat_and_examples_before_it(tasks):
    folder = chat_folder()
    manager = tasks.manager(folder, 300)
    more = {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": True}
    got, want = (
        evaluated(model, [tasks.short], manager, 2, **more)
        for model in (ours(folder), theirs(folder))
    )
    assert_agree(got, want, tasks.short)
    for mine, its in zip(*(run["samples"][tasks.short] for run in (got, want)), strict=True):
        assert mine["arguments"] == its["arguments"]
        assert "<user>" in mine["arguments"][0][0]


def instances(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def test_requests_of_every_kind_and_length():
    """Empty contexts, contexts that are too long, one context many times, long continuations."""
    folder = chat_folder()
    mine, its = ours(folder, max_length=100, batch_size=3), theirs(folder, max_length=100)
    text = " ".join(LINES * 3)
    pairs = [("", " the ship"), (text, " Aurora."), ("a", "b"), ("a ", "b"), (LINES[0], LINES[1])]
    pairs += [(LINES[0], f" {n}") for n in range(5)]
    got, want = (lm.loglikelihood(instances(*pairs), disable_tqdm=True) for lm in (mine, its))
    for (a, a_greedy), (b, b_greedy) in zip(got, want, strict=True):
        assert abs(a - b) < BOUND and a_greedy == b_greedy
    texts = [(text,), (LINES[0],), ("x",)]
    got, want = (
        lm.loglikelihood_rolling(instances(*texts), disable_tqdm=True) for lm in (mine, its)
    )
    assert got == pytest.approx(want, abs=BOUND)


def test_answers_end_where_they_should():
    folder = chat_folder()
    mine, its = ours(folder, max_length=200), theirs(folder, max_length=200)
    whole = mine.generate_until(instances((LINES[0], {"max_gen_toks": 20})), disable_tqdm=True)[0]
    asked = [
        (LINES[0], {"max_gen_toks": 20, "until": [whole[3:6]]}),
        (LINES[0], {"max_gen_toks": 3, "until": []}),
        (" ".join(LINES * 9), {"max_gen_toks": 20, "until": ["\n\n"], "do_sample": False}),
        (LINES[1], {"max_tokens": 5, "until": "e", "temperature": 0.0}),
    ]
    got, want = (lm.generate_until(instances(*asked), disable_tqdm=True) for lm in (mine, its))
    assert got == want
    assert got[0] == whole[: whole.index(whole[3:6])]


def test_special_tokens_end_answers_too():
    """They are in no text, so that no search of texts finds them."""
    lm = ours(chat_folder())
    bot, end = lm.tokenizer.convert_tokens_to_ids(["<bot>", lm.tokenizer.eos_token])
    assert lm._ends(["<bot>", "a", "<bot>a", "the"]) == {bot, end}
    document = lm.runtime.encode(LINES[0])
    whole = lm.runtime.answer(document, [5, 6], max_new_tokens=12).ids
    at = next(at for at, token in enumerate(whole) if at and token not in whole[:at])
    cut = lm.runtime.answer(document, [5, 6], max_new_tokens=12, ends=[whole[at]])
    assert cut.ids == whole[:at] and cut.finish_reason == "stop"


def test_a_template_without_a_system_s_part(tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(chat_folder(), folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.25}')
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    mine, its = ours(str(folder)), theirs(str(folder))
    assert mine.apply_chat_template(chat) == its.apply_chat_template(chat) == "<user>Who?"
    assert "left out" in caplog.text and "asks for repetition_penalty: there is none" in caplog.text


def test_contexts_that_fit_alone_are_encoded_alone():
    """What made room for others of its batch is encoded again."""
    folder, token = chat_folder(), 2 * 2 * 2 * 8 * 4
    lines = [" ".join(LINES[n:] + LINES[:n]) for n in range(4)]
    pairs = instances(*((line, more) for line in lines for more in (" Aurora.", " the ship left")))
    want = ours(folder, world_size=1)
    longest = max(len(want.tok_encode(line)) for line in lines)
    cache = CacheConfig(max_bytes=(longest + 24) * token, page_tokens=4)
    got = ours(folder, world_size=1, cache=cache)
    with pytest.raises(UserError, match=r"cache\.max_bytes"):
        got.runtime.encode_batch([want.tok_encode(line) for line in lines])
    for name in ("loglikelihood", "loglikelihood_rolling"):
        some = pairs if name == "loglikelihood" else instances(*((line,) for line in lines))
        found, whole = (getattr(lm, name)(some, disable_tqdm=True) for lm in (got, want))
        assert torch.tensor(found).sub(torch.tensor(whole)).abs().max() < 1e-4


def test_samples_are_drawn_anew_for_each_request():
    lm = ours(chat_folder(), seed=5)
    sampled = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "until": []}
    twice = [lm.generate_until(instances(*[(LINES[0], sampled)] * 3)) for _ in range(2)]
    assert twice[0] == twice[1] and len(set(twice[0])) > 1


def test_each_context_is_encoded_once(monkeypatch):
    lm, encoded = ours(chat_folder()), []
    real = lm.runtime.encode_batch

    def encode_batch(texts, **more):
        encoded.append([len(text) for text in texts])
        return real(texts, **more)

    monkeypatch.setattr(lm.runtime, "encode_batch", encode_batch)
    pairs = [(line, f" {choice}") for line in LINES for choice in "abcd"]
    lm.loglikelihood(instances(*pairs), disable_tqdm=True)
    sizes = [len(lm.tok_encode(line)) - 1 for line in LINES]
    assert encoded == [sorted(sizes, reverse=True)]


def test_star_reads_the_end_of_a_context_with_all_of_it_in_sight():
    """As if the user had split it."""
    folder, text = chat_folder(), " ".join(LINES * 10)
    star = LongContext.from_pretrained(
        folder, strategy=StarConfig(block_size=64), transport="threads", world_size=2
    )
    lm = RingstarLM(runtime=star, query_tokens=20)
    ids, more = lm.tok_encode(text), lm.tok_encode(" Aurora.")
    ((total, _),) = lm.loglikelihood(instances((text, " Aurora.")))
    (score,) = star.score(star.encode(ids[:-20]), [more], after=ids[-20:])
    assert total == pytest.approx(score.logprob, abs=1e-5)
    (answer,) = lm.generate_until(instances((text, {"max_gen_toks": 6, "until": []})))
    want = star.ask(star.encode(ids[:-20]), ids[-20:], max_new_tokens=6)
    assert answer == lm.tokenizer.decode(want.ids)
    assert RingstarLM(runtime=star).query_tokens == 256
    ((exact, _),) = ours(folder).loglikelihood(instances((text, " Aurora.")))
    assert abs(exact - total) > 1e-2


def test_star_takes_texts_shorter_than_its_anchors():
    """One block is exact, and has no anchor."""
    star = ours(chat_folder(), strategy=StarConfig(block_size=128, anchor_size=64))
    exact = ours(chat_folder())
    pair, text = instances(("The ship left the harbour", " at dawn.")), instances(("The ship.",))
    assert star.loglikelihood(pair)[0] == pytest.approx(exact.loglikelihood(pair)[0], abs=1e-4)
    whole, its = star.loglikelihood_rolling(text), exact.loglikelihood_rolling(text)
    assert whole == pytest.approx(its, abs=1e-4)
    with pytest.raises(UserError, match="give block_size too"):
        ours(chat_folder(), strategy=StarConfig(anchor_size=64))


def test_neighbouring_seeds_have_no_sample_in_common():
    drawn = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12, "until": [], "top_k": 0}
    one, other = (
        set(ours(chat_folder(), seed=seed).generate_until(instances(*[(LINES[0], drawn)] * 8)))
        for seed in (0, 1)
    )
    assert len(one) == len(other) == 8 and not one & other


def test_what_differs_from_the_own_backend_is_said(caplog, tmp_path):
    drawn = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 2, "until": []}
    with caplog.at_level("WARNING"):
        ours(chat_folder()).generate_until(instances(*[(line, drawn) for line in LINES]))
    assert caplog.text.count("names no top_k") == 1
    assert "limits sampling" not in caplog.text
    folder = shutil.copytree(chat_folder(), tmp_path / "limited")
    (folder / "generation_config.json").write_text('{"top_p": 0.9, "min_p": 0.0}')
    lm = ours(str(folder))
    for given, times in ((0.8, 0), (None, 1), (None, 1)):
        with caplog.at_level("WARNING"):
            lm.generate_until(instances((LINES[0], {**drawn, "top_p": given})))
        assert caplog.text.count("limits sampling by top_p, which") == times


def test_what_changes_nothing_may_be_asked_for():
    plain = {"max_gen_toks": 6, "until": []}
    neutral = {"use_cache": True, "min_p": 0, "typical_p": 1.0, "num_return_sequences": 1}
    greedy = {"min_p": 0.1, "typical_p": 0.5, "top_k": 3, "top_p": 0.5}
    given = [{**plain, **more} for more in ({}, neutral, greedy)]
    answers = ours(chat_folder()).generate_until(instances(*[(LINES[0], each) for each in given]))
    assert len(set(answers)) == 1


def test_an_answer_ends_where_longrope_would_change(caplog):
    """What comes before would have to be encoded again."""
    lm = ours(chat_folder.__wrapped__("phi3", **LONGROPE, hidden_size=64))
    jump = lm.runtime.files.rope_jumps_after
    text = " ".join(LINES * 9)
    context = lm.tokenizer.decode(lm.tok_encode(text)[: jump - 5])
    read = len(lm.tok_encode(context))
    asked = {"max_gen_toks": 32, "until": []}
    with caplog.at_level("WARNING"):
        (answer,) = lm.generate_until(instances((context, asked)))
    assert read <= jump < read + 31 and "(longrope) changes" in caplog.text
    want = lm.runtime.ask(
        lm.runtime.encode(lm.tok_encode(context)[:-1]),
        lm.tok_encode(context)[-1:],
        max_new_tokens=jump - read + 1,
    )
    assert answer == lm.tokenizer.decode(want.ids, skip_special_tokens=True)


def test_it_is_registered_by_name(caplog):
    made = lm_eval.api.registry.get_model("ringstar").create_from_arg_string(
        f"pretrained={chat_folder()},transport=threads,world_size=2,strategy=star",
        {"batch_size": 4, "max_batch_size": None, "device": None},
    )
    assert isinstance(made, RingstarLM) and made.batch_size == 4 and made.query_tokens == 256
    assert (made.rank, made.world_size, made.runtime.world_size) == (0, 1, 2)
    with caplog.at_level("WARNING"):
        ours(chat_folder(), device="cuda:0")
    assert "device=cuda:0 is not asked" in caplog.text
    assert ours(chat_folder(), batch_size="auto:4").batch_size == 64


def test_what_it_cannot_do_is_refused():
    with pytest.raises(UserError, match="has no tokenizer"):
        ours(tiny_folder("llama"))
    with pytest.raises(UserError, match="a model's folder, or a runtime"):
        RingstarLM()
    with pytest.raises(UserError, match="strategy=star: the runtime that is given has its own"):
        RingstarLM(runtime=ours(chat_folder()).runtime, strategy="star")
    lm = ours(chat_folder(), max_length=64)
    for kwargs, why in [
        ({"num_beams": 4}, "generation_kwargs.num_beams=4"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 5}, "generation_kwargs.top_k=5"),
        ({"do_sample": True, "top_k": 0}, "generation_kwargs.temperature=0.0: do_sample needs"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0}, "generation.top_p=0"),
        ({"max_gen_toks": 64}, "leaves 0 of 64 positions"),
    ]:
        with pytest.raises(UserError, match=why):
            lm.generate_until(instances((LINES[0], kwargs)))
    with pytest.raises(UserError, match="two tokens or more"):
        lm.generate_until(instances(("a", {"max_gen_toks": 4})))


@pytest.mark.slow
def test_smollm2_agrees_with_the_own_backend(tasks):
    """Real weights: multiple choice, and a needle among 900 tokens that it finds."""
    folder = str(find_model(ModelConfig(name="smollm2")).folder)
    manager, names = tasks.manager(folder, 900), [tasks.short, tasks.long]
    more = {"gen_kwargs": {"max_gen_toks": 16}, "num_fewshot": 0}
    mine = ours(folder, world_size=4, dtype="float32")
    got, want = (evaluated(model, names, manager, 2, **more) for model in (mine, theirs(folder)))
    for name in names:
        assert_agree(got, want, name)
    assert got["results"][tasks.long]["900,none"] == 1.0
