"""python -m pytest tests/ringstar/test_generation.py"""

import pytest
import torch

from ringstar import UserError
from ringstar.answers import TextStream
from ringstar.config import GenerationConfig
from ringstar.sampling import Sampler
from tests.support.chat import chat_folder
from tests.support.models import random_ids, tiny_folder
from tests.support.runtime import simulated


def test_greedy_takes_the_likeliest():
    assert Sampler(GenerationConfig())(torch.tensor([0.1, 2.0, 1.9])) == 1


def test_a_seed_fixes_the_draws():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))

    def draws(seed):
        sampler = Sampler(GenerationConfig(temperature=1.0, seed=seed))
        return [sampler(logits) for _ in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, allowed in (
        (0.4, {0}),
        (0.5, {0}),
        (0.6, {0, 1}),
        (0.9, {0, 1, 2}),
        (1.0, {0, 1, 2, 3}),
    ):
        sampler = Sampler(GenerationConfig(temperature=1.0, top_p=top_p))
        assert {sampler(logits) for _ in range(400)} == allowed


def test_frequencies_follow_the_temperature():
    logits = torch.tensor([1.0, 0.0])
    sampler = Sampler(GenerationConfig(temperature=0.5))
    share = sum(sampler(logits) == 0 for _ in range(4000)) / 4000
    assert share == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), abs=0.03)


def runtime(world=3):
    return simulated(tiny_folder("llama"), world)


def test_sampling_does_not_depend_on_the_number_of_ranks():
    answers = []
    for world in (1, 2, 4):
        ring = runtime(world)
        document = ring.encode(random_ids(30))
        answer = ring.ask(document, random_ids(4), max_new_tokens=12, temperature=0.8, seed=5)
        answers.append(answer.ids)
    assert answers[0] == answers[1] == answers[2]


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(monkeypatch):
    ring = runtime()
    document, question = ring.encode(random_ids(30)), random_ids(4)
    free = ring.ask(document, question, max_new_tokens=8)
    assert free.finish_reason == "length"
    end = free.ids[3]
    monkeypatch.setattr(type(ring.files), "end_tokens", lambda self: frozenset({end}))
    ended = ring.ask(document, question, max_new_tokens=8)
    assert (ended.finish_reason, ended.ids) == ("stop", free.ids[: free.ids.index(end)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "generation.max_new_tokens=0"),
        ({"temperature": -1.0}, "generation.temperature=-1.0"),
        ({"top_p": 7}, "generation.top_p=7"),
        ({"stop": ["x"]}, "generation.stop=x"),
        ({"max_new_tokens": 2.5}, "an integer above 0"),
        ({"stop": "END"}, "a list of texts"),
        ({"stop": [""]}, "cannot be empty"),
    ],
)
def test_wrong_settings_are_refused_by_name(changes, message):
    ring = runtime(1)
    document = ring.encode(random_ids(5))
    with pytest.raises(UserError, match=message):
        ring.ask(document, random_ids(2), **changes)


def test_ids_and_lengths_are_checked():
    ring = runtime(1)
    with pytest.raises(UserError, match="document: is empty"):
        ring.encode([])
    with pytest.raises(UserError, match="document=97: token ids must be from 0 to 96"):
        ring.encode([1, 97])
    with pytest.raises(UserError, match=r"limit is 8192; model\.allow_beyond_limit=true"):
        ring.encode([1] * 8193)
    document = ring.encode([1] * 8000)
    with pytest.raises(UserError, match=r"8000 tokens \+ question 100 \+ answer 93: 8193 pos"):
        ring.ask(document, [1] * 100, max_new_tokens=93)


class Letters:
    """A tokenizer of single bytes: characters may need several tokens."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", errors="replace")


def shown(text: str, stops=()):
    pieces: list[str] = []
    stream = TextStream(Letters(), stops, pieces.append)
    for token in text.encode():
        if stream.add(token):
            break
    return pieces, stream.finish()


def test_text_is_streamed_as_it_comes():
    pieces, text = shown("abc")
    assert (pieces, text) == (["a", "b", "c"], "abc")


class Words:
    """As SentencePiece decodes: a space before each word, but none at the beginning."""

    def decode(self, ids, skip_special_tokens=False):
        shown = [word for word in ids if not skip_special_tokens or word != "<special>"]
        return "".join(f" {word}" for word in shown)[1:]


def test_a_special_token_leaves_the_space_behind_it():
    stream = TextStream(Words(), (), None)
    for word in ("one", "two", "<special>", "three"):
        stream.add(word)
    assert stream.finish() == "one two three"
    for _ in range(50):
        stream.add("<special>")
    assert len(stream._ids) == 3  # a row of them costs nothing


def test_unfinished_characters_are_held_back():
    pieces, text = shown("né€😀")
    assert pieces == ["n", "é", "€", "😀"]
    assert text == "né€😀"


def test_an_answer_may_end_in_the_middle_of_a_character():
    """As the tokenizer shows it; a bound on its length ended it there."""
    stream = TextStream(Letters(), (), None)
    for token in "né".encode()[:-1]:
        assert not stream.add(token)
    assert stream.finish() == "n\ufffd"


def test_a_stop_text_ends_the_answer_and_is_never_shown():
    pieces, text = shown("one STOP two", stops=["STOP"])
    assert text == "one "
    assert "".join(pieces) == "one "


def test_what_might_have_been_a_stop_text_is_shown_later():
    pieces, text = shown("a STIR", stops=["STOP"])
    assert "".join(pieces) == text == "a STIR"
    assert "STI" in pieces  # held back until it could not be the stop any more


def test_an_answer_ends_once_it_says_what_was_wanted():
    """On every rank at the same token; and its text stays whole."""
    ring = simulated(chat_folder(), 3)
    document = ring.encode("The ship left the harbour at dawn.")
    free = ring.ask(document, "Who?", max_new_tokens=20)
    wanted, seen = free.text[: len(free.text) // 2], []

    def until(text: str) -> bool:
        seen.append(text)
        return wanted in text

    ended = ring.ask(document, "Who?", max_new_tokens=20, until=until)
    assert ended.ids == free.ids[: len(ended.ids)]
    assert len(ended.ids) < len(free.ids)
    assert wanted in ended.text and ended.finish_reason == "stop"
    assert len(seen) == 3 * len(ended.ids)
    assert ring.ask(document, "Who?", max_new_tokens=20).ids == free.ids  # nothing is left behind
