"""python -m pytest tests/ringstar/test_conversation.py

Questions that follow one another: each answer is one device's for the whole text so far.
"""

import gc
import weakref

import pytest

from ringstar import UserError
from ringstar.config import StarConfig
from tests.support.chat import chat_folder
from tests.support.models import expected, over_bound, random_ids, tiny_folder
from tests.support.runtime import simulated

DOCUMENT, NEW = random_ids(90), 8
TURNS = [random_ids(tokens, seed=tokens) for tokens in (7, 1, 30)]


def runtime(folder, world=3, **options):
    return simulated(folder, world, **options)


def check(folder, before, question, answer):
    """Against one device, which reads everything again; returns the text so far."""
    want = expected(folder, before + question, NEW)
    assert over_bound(answer.first_logits, want) <= 1
    assert answer.ids == want.ids
    return before + question + answer.ids


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_oss", "smollm3"])
@pytest.mark.parametrize("world", [1, 3])
def test_each_turn_sees_those_before_it(family, world):
    folder = tiny_folder(family)
    ring = runtime(folder, world, chunk_tokens=11)
    document = ring.encode(DOCUMENT)
    talk, text = ring.converse(document), DOCUMENT
    for question in TURNS:
        text = check(folder, text, question, talk.ask(question, max_new_tokens=NEW))
        assert DOCUMENT + talk.ids == text


def test_nothing_holds_a_document_that_was_talked_about():
    """Without the garbage collector, which comes to ranks at different times."""
    ring = runtime(tiny_folder("llama"), 2)
    talk = ring.converse(ring.encode(DOCUMENT))
    talk.ask(TURNS[0], max_new_tokens=2)
    document = weakref.ref(talk.document)
    gc.disable()
    try:
        del talk
        assert document() is None
    finally:
        gc.enable()


def test_what_an_answer_sent_is_its_own():
    """With what its document did, and nothing of what was asked before."""
    ring = runtime(tiny_folder("llama"), 2)
    document = ring.encode(DOCUMENT)
    first, second = (ring.ask(document, TURNS[0], max_new_tokens=3).metrics for _ in range(2))
    assert first.bytes_sent == second.bytes_sent
    assert first.bytes_sent[0] > document.metrics.bytes_sent[0]


def test_turns_are_read_once():
    ring, seen = runtime(tiny_folder("llama"), 2), []
    document = ring.encode(DOCUMENT)
    hook = ring.group.engines[0].model.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    talk = ring.converse(document)
    for question in TURNS:
        talk.ask(question, max_new_tokens=NEW)
    # every rank reads each question, and each token but the last of the last answer
    assert sum(seen) == 2 * (len(talk.ids) - 1)
    seen.clear()
    ring.ask(document, [5], max_new_tokens=1)
    talk.ask([6], max_new_tokens=1)  # its turns are read again, the document is not
    hook.remove()
    assert sum(seen) == 2 * (1 + len(talk.ids) - 1)


def test_several_conversations_about_one_document_do_not_meet():
    folder = tiny_folder("gemma2")
    ring = runtime(folder)
    document = ring.encode(DOCUMENT)
    talks = [ring.converse(document) for _ in range(2)]
    texts = [DOCUMENT, DOCUMENT]
    for turn, question in enumerate([*TURNS, *TURNS]):
        one = turn % 2
        answer = talks[one].ask(question, max_new_tokens=NEW)
        texts[one] = check(folder, texts[one], question, answer)
        if turn == 3:
            check(folder, DOCUMENT, question, ring.ask(document, question, max_new_tokens=NEW))


def test_a_turn_that_failed_leaves_the_turns_before_it():
    folder = tiny_folder("llama")
    ring = runtime(folder)
    talk = ring.converse(ring.encode(DOCUMENT))
    text = check(folder, DOCUMENT, TURNS[0], talk.ask(TURNS[0], max_new_tokens=NEW))

    def fails(_, args, output):
        raise KeyError("once")

    hook = ring.group.engines[0].model.model.lm_head.register_forward_hook(fails)
    with pytest.raises(KeyError):
        talk.ask(TURNS[1], max_new_tokens=NEW)
    hook.remove()
    check(folder, text, TURNS[2], talk.ask(TURNS[2], max_new_tokens=NEW))


@pytest.mark.parametrize("world", [1, 3])
def test_a_turn_that_was_interrupted_is_forgotten(world):
    """Its tokens may all have been read before anybody heard."""
    folder = tiny_folder("llama")
    ring = runtime(folder, world)
    document = ring.encode(DOCUMENT)
    talk = ring.converse(document)
    text = check(folder, DOCUMENT, TURNS[0], talk.ask(TURNS[0], max_new_tokens=NEW))
    ring.answer(document, TURNS[1], top=talk, before=talk.ids, max_new_tokens=NEW)
    check(folder, text, TURNS[2], talk.ask(TURNS[2], max_new_tokens=NEW))


def test_nothing_of_it_is_saved_or_appended_to(tmp_path):
    folder = tiny_folder("gemma2")
    ring = runtime(folder)
    document = ring.encode(DOCUMENT)
    ring.converse(document).ask(TURNS[0], max_new_tokens=NEW)
    ring.save(document, str(tmp_path))
    other = runtime(folder, 2)
    loaded = other.load(str(tmp_path))
    check(folder, DOCUMENT, TURNS[1], other.ask(loaded, TURNS[1], max_new_tokens=NEW))
    longer = ring.append(document, TURNS[2])
    answer = ring.ask(longer, TURNS[1], max_new_tokens=NEW)
    check(folder, DOCUMENT + TURNS[2], TURNS[1], answer)


def test_star_documents_are_talked_about_too():
    star = runtime(tiny_folder("llama"), strategy=StarConfig(block_size=30))
    document = star.encode(DOCUMENT)
    talk = star.converse(document)
    first = talk.ask(TURNS[0], max_new_tokens=NEW)
    second = talk.ask(TURNS[1], max_new_tokens=NEW)
    again = star.ask(document, TURNS[0] + first.ids + TURNS[1], max_new_tokens=NEW)
    assert second.ids == again.ids


def test_texts_are_put_together_by_the_chat_template():
    ring = runtime(chat_folder(), 2)
    tokenizer = ring.files.tokenizer
    document = ring.encode("The ship left.")
    talk = ring.converse(document)
    answers = [talk.ask(text, max_new_tokens=4).text for text in ("Who left?", "And when?")]
    ids = document.ids + talk.ids
    whole = tokenizer.decode(ids)
    assert whole.startswith("<user>The ship left.\n\nWho left?<end><bot>")
    assert whole.count("<end><user>And when?<end><bot>") == 1
    assert len(answers) == 2


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages[0]['content'] }}<bot>", "its chat template has no second turn"),
        (
            "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}"
            "<user>{{ messages[0]['content'] }}<bot>",
            "its chat template has no second turn",
        ),
    ],
)
def test_a_template_without_a_second_turn_is_said_to_be(template, why):
    ring = runtime(chat_folder(), 1)
    ring.files.tokenizer.chat_template = template
    talk = ring.converse(ring.encode("The ship left."))
    talk.ask("Who left?", max_new_tokens=2)
    with pytest.raises(UserError, match=why):
        talk.ask("And when?", max_new_tokens=2)
    assert talk.ask([5, 6], max_new_tokens=2).ids  # ids are read as they are


def test_a_conversation_that_grows_too_long_is_refused():
    ring = runtime(tiny_folder("llama", max_position_embeddings=128), 2)
    talk = ring.converse(ring.encode(DOCUMENT))
    talk.ask(random_ids(20), max_new_tokens=4)
    with pytest.raises(UserError, match="the model's limit is 128"):
        talk.ask(random_ids(20), max_new_tokens=4)
    assert len(talk.ask([3], max_new_tokens=4).ids) == 4
    with pytest.raises(UserError, match="question: is empty"):
        talk.ask(" ")
