"""python -m pytest tests/ringstar/test_evaluation_tasks.py

Each task has what RULER says, is as long as asked, and is the same for the same seed.
"""

import json
import re
import string
from collections import Counter
from hashlib import sha256
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.evaluate_prompt import prompt_ids, token_counter
from ringstar.config import ModelConfig
from ringstar.errors import UserError
from ringstar.evaluation import (
    BY_DEPTH,
    RULER,
    TASKS,
    Material,
    NoSample,
    Prompt,
    TooShort,
    check_packages,
    essay_of,
    even_depths,
    make_sample,
    read_questions,
    score,
)
from ringstar.evaluation.fwe import counts_of
from ringstar.evaluation.haystacks import NOISE, Haystack, default_essay, place
from ringstar.evaluation.samples import Draft
from ringstar.evaluation.sizing import fill
from ringstar.models import find_model
from tests.support.chat import chat_folder

pytest.importorskip("wonderwords")

SENTENCES = [f"Sentence {'abcdefghij'[n % 10]}{n // 10} says nothing of note." for n in range(90)]
MATERIAL = Material(lambda: essay_of(" ".join(SENTENCES), "test"))
PARTS = re.compile(r"\w{1,4}|[^\w\s]")
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def count(prompt: Prompt) -> int:
    """A tokenizer that cuts words into fours."""
    texts = (prompt.document, prompt.question, prompt.answer_prefix)
    return sum(len(PARTS.findall(text)) for text in texts)


def sample_of(name: str, length: int = 2000, number: int = 0, seed: int = 0, depth=None):
    return make_sample(TASKS[name], length, number, seed, MATERIAL, count, depth)


def test_there_are_thirteen_and_needles_by_depth():
    assert len(RULER) == 13
    assert set(TASKS) - set(RULER) == {BY_DEPTH}
    new = {name: TASKS[name].new_tokens for name in RULER if not name.startswith("niah")}
    assert new == {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert {TASKS[name].new_tokens for name in RULER if name.startswith("niah")} == {128}
    assert [name for name in RULER if TASKS[name].match == "part"] == ["qa_1", "qa_2"]


@pytest.mark.parametrize("name", TASKS)
def test_as_many_references_as_a_score_has_parts(name):
    sample = sample_of(name, depth=0.5 if name == BY_DEPTH else None)
    assert len(sample.references) == TASKS[name].references
    assert len(set(sample.references)) == len(sample.references)


# -- needles -----------------------------------------------------------------------------------


KEYS = {"words": r"[a-z]+-[a-z]+", "uuids": UUID}
VALUES = {"numbers": r"[1-9]\d{6}", "uuids": UUID}


@pytest.mark.parametrize("name", [name for name in RULER if name.startswith("niah")])
@pytest.mark.parametrize("number", range(4))
def test_needles(name, number):
    """Keys, values and their numbers; all that is asked is there once, and nothing else is."""
    task, sample = TASKS[name].maker, sample_of(name, number=number)
    found = NEEDLE.findall(sample.prompt.document)
    for kind, key, value in found:
        assert kind == task.value
        assert re.fullmatch(KEYS[task.key], key)
        assert re.fullmatch(VALUES[task.value], value)
    planted = task.keys * task.values
    assert len(found) > 10 if task.haystack == "needles" else len(found) == planted
    assert len({value for _, _, value in found}) == len(found)
    asked = {key for _, key, _ in found if key in sample.prompt.question}
    assert len(asked) == task.queried
    assert all(key in sample.prompt.answer_prefix for key in asked)
    values = Counter(key for _, key, _ in found)
    assert all(values[key] == task.values for key in asked)
    assert {value for _, key, value in found if key in asked} == set(sample.references)
    singular = task.values * task.queried == 1
    assert sample.prompt.document.startswith("A special" if singular else "Some special")
    assert f" {'is' if singular else 'are'} " in sample.prompt.question
    assert sample.prompt.answer_prefix.endswith(" is" if singular else " are")


def test_haystacks_of_needles():
    noise = sample_of("niah_single_1").prompt.document.split("\n")[1:]
    kinds = Counter("needle" if NEEDLE.fullmatch(line) else line for line in noise[:-1])
    assert kinds[NOISE] > 40
    assert kinds.total() - kinds[NOISE] <= 1
    needles = sample_of("niah_multikey_3").prompt.document.split("\n")[1:]
    assert all(NEEDLE.fullmatch(line) for line in needles[:-1])  # the last may be cut
    essay = sample_of("niah_single_2").prompt.document.partition("\n")[2]
    rest = NEEDLE.sub("", essay).replace("  ", " ")
    # the essay in order, from some sentence on, and again from its beginning
    assert rest.strip() in " ".join(SENTENCES * 4)


def test_needles_of_essays_stand_at_even_depths():
    hidden = set()
    for number in range(60):
        text = sample_of("niah_multikey_1", number=number).prompt.document.partition("\n")[2]
        lines = re.split(r"(?<=\.) (?=[SO])", text)
        at = [i for i, line in enumerate(lines) if NEEDLE.fullmatch(line)]
        sentences = len(lines) - len(at)
        places = {place(point / 39, sentences) for point in range(40)}
        assert {i - before for before, i in enumerate(at)} <= places
        hidden |= {round(i / len(lines), 1) for i in at}
    assert min(hidden) == 0 and max(hidden) >= 0.9
    assert len(hidden) >= 10


@pytest.mark.parametrize("depth", even_depths(5))
def test_a_needle_at_a_chosen_depth(depth):
    sample = sample_of(BY_DEPTH, depth=depth)
    text = sample.prompt.document.partition("\n")[2]
    (found,) = NEEDLE.finditer(text)
    before, behind = found.start(), len(text) - found.end()
    assert before / (before + behind) == pytest.approx(depth, abs=0.02)
    assert found[3] == sample.references[0] == sample_of(BY_DEPTH, depth=0.0).references[0]


def test_places():
    assert [place(depth, 4) for depth in (0, 0.19, 0.21, 0.5, 0.99, 1)] == [0, 0, 1, 2, 4, 4]
    hay = Haystack(str, " ")
    assert hay.text(3, "3", [(1.0, "z"), (0.5, "b"), (0.5, "c"), (0.0, "a")]) == "a 0 1 b c 2 3 z"
    assert even_depths(1) == [0.5]


# -- the others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(5))
def test_variable_tracking(number):
    """One chain in order among noise, behind a solved example with names of its own."""
    sample = sample_of("vt", number=number)
    example, text = sample.prompt.document.split("\n\nMemorize", 1)
    shown, chain = (re.findall(r"^VAR (\w+) = (.+)$", t, re.MULTILINE) for t in (example, text))
    for found in (shown, chain):
        names, values = zip(*found, strict=True)
        assert len(set(names)) == 5
        assert all(re.fullmatch("[A-Z]{5}", name) for name in names)
        assert re.fullmatch(r"\d{5}", values[0])
        assert list(values[1:]) == [f"VAR {name}" for name in names[:-1]]
    assert sample.references == tuple(name for name, _ in chain)
    assert not {name for name, _ in shown} & set(sample.references)
    assert chain[0][1] in sample.prompt.question
    assert chain[0][1] in sample.prompt.answer_prefix
    assert example.endswith(" ".join(name for name, _ in shown))  # solved
    assert example.count(NOISE) == 5
    assert text.count(NOISE) > 30


@pytest.mark.parametrize(("length", "often"), [(2000, (6, 1)), (4095, (6, 1)), (4096, (30, 3))])
def test_common_words(length, often):
    sample = sample_of("cwe", length)
    example, text = sample.prompt.document.split("\n\nBelow", 1)
    words = re.findall(r"(\d+)\. (\S+)", text)
    assert [int(number) for number, _ in words] == list(range(1, len(words) + 1))
    counts = Counter(word for _, word in words)
    assert Counter(counts.values())[often[0]] == 10
    assert set(counts.values()) == set(often)
    assert {word for word, n in counts.items() if n == often[0]} == set(sample.references)
    assert [word for _, word in words] != sorted(word for _, word in words)
    listed, solved = example.split("Answer:")
    shown = Counter(word for _, word in re.findall(r"(\d+)\. (\S+)", listed))
    # as RULER has it: 40 words in all, or 40 different ones
    assert Counter(shown.values()) == ({3: 10, 1: 10} if length < 4096 else {10: 10, 3: 30})
    most = {word for word, n in shown.items() if n == max(shown.values())}
    assert most == set(re.findall(r"\. (\S+)", solved))
    assert not shown.keys() & counts.keys()


def test_common_words_beyond_all_words_are_pairs():
    words = MATERIAL.words.distinct(Random(0))
    many = [next(words) for _ in range(12_000)]
    assert len(set(many)) == 12_000
    assert "-" not in many[100] and "-" in many[-1]


@pytest.mark.parametrize("length", [1000, 2000, 8000])
def test_frequent_words(length):
    sample = sample_of("fwe", length)
    words = sample.prompt.document.partition("\n")[2].split(" ")
    counts = Counter(words).most_common()
    assert counts[0][0] == "..."
    assert tuple(word for word, _ in counts[1:4]) == sample.references
    assert len({n for _, n in counts[:5]}) == 5  # ranks 2 to 4 are told apart
    assert all(len(w) == 6 and set(w) <= set(string.ascii_lowercase) for w, _ in counts[1:])
    expected = counts_of(round(counts[1][1] * 4 * 1.645), length // 50)
    assert [n for _, n in counts[1:4]] == pytest.approx(expected[1:4], abs=1)
    assert sum(expected[4:]) > 0 and len(counts) <= length // 50


@pytest.mark.parametrize(("name", "gold"), [("qa_1", 1), ("qa_2", 2)])
def test_questions_stand_among_other_paragraphs(name, gold):
    sample = sample_of(name)
    documents = re.split(r"Document \d+:\n", sample.prompt.document)[1:]
    numbers = [int(n) for n in re.findall(r"Document (\d+):", sample.prompt.document)]
    assert numbers == list(range(1, len(documents) + 1))
    assert len(documents) > 8
    asked = sample.prompt.question.partition("Question: ")[2]
    (item,) = [item for item in MATERIAL.questions.items if item.question == asked]
    assert item.answers == sample.references
    assert len(item.paragraphs) == gold
    whole = [text.strip() for text in documents]
    places = [whole.index(text) for text in item.paragraphs]
    assert sample.references[0] in item.paragraphs[-1]
    assert places != list(range(gold))  # shuffled


def test_invented_questions_have_one_answer():
    made = MATERIAL.questions
    assert len({item.question for item in made.items}) == len(made.items)
    for item in made.items:
        person, *_ = item.paragraphs
        name = " ".join(person.split()[:2])
        assert name in item.question
        assert item.answers[0] in item.paragraphs[-1]
        assert sum(text.startswith(f"{name} was") for text in made.paragraphs) == 1
    two = made.of_hops(True)
    assert all(item.answers[0] not in item.paragraphs[0] for item in two)


def test_no_question_comes_again_before_all_have_come():
    rows = [{"question": f"{n}?", "answers": ["a"], "paragraphs": [f"{n}: a."]} for n in range(7)]
    material = Material(questions=lambda: read_questions(json.dumps(rows), "all"))
    for seed in range(3):
        samples = [make_sample(TASKS["qa_1"], 900, n, seed, material, count) for n in range(14)]
        asked = [sample.prompt.question for sample in samples]
        assert len(set(asked[:7])) == 7 and asked[:7] == asked[7:]
        contexts = {sample.prompt.document for sample in samples}
        assert len(contexts) == 14


def test_a_package_that_is_too_old_is_named(monkeypatch):
    check_packages()
    monkeypatch.setattr("ringstar.evaluation.packages.version", lambda name: "2.2.0")
    with pytest.raises(UserError, match=r"wonderwords 2\.2\.0 is too old, 3 is needed"):
        check_packages()


def test_a_small_set_distracts_again_and_gold_that_is_too_long_is_left_out():
    rows = [
        {"question": "Who?", "answers": ["Ann"], "paragraphs": ["Ann did. " * 2000]},
        {"question": "When?", "answers": ["noon", "12"], "paragraphs": ["At noon it rang."]},
        {"paragraphs": ["Nothing was said of the rest."]},
    ]
    text = "\n".join(map(json.dumps, rows[1:]))
    material = Material(questions=lambda: read_questions(json.dumps(rows), "all"))
    for number in range(6):
        sample = make_sample(TASKS["qa_1"], 1000, number, 0, material, count)
        assert sample.references == ("noon", "12")
        assert sample.prompt.document.count("At noon it rang.") == 1
    small = Material(questions=lambda: read_questions(text, "lines"))
    document = make_sample(TASKS["qa_1"], 1000, 0, 0, small, count).prompt.document
    assert document.count("Nothing was said of the rest.") > 20
    with pytest.raises(NoSample):
        make_sample(TASKS["qa_2"], 1000, 0, 0, small, count)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{", "is not JSON"),
        ("[1]", "item 1"),
        ('{"paragraphs": ["a"]}', "has no question"),
        ('{"paragraphs": ["a"]}\n{"question": "b", "paragraphs": ["a"]}', "line 2"),
        ('{"question": "b", "answers": ["c"], "paragraphs": []}', "line 1"),
        ('{"question": 1, "answers": ["c"], "paragraphs": ["a"]}', "line 1"),
        ('[{"question": "b", "answers": [2], "paragraphs": ["a"]}]', "item 1"),
        ('{"question": "b \\ud83d", "answers": ["c"], "paragraphs": ["a"]}', "line 1: holds half"),
    ],
)
def test_a_wrong_file_of_questions(text, where):
    with pytest.raises(ValueError, match=where):
        read_questions(text, "file")


# -- length and seed ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(list(TASKS)),
    length=st.integers(1000, 12_000),
    seed=st.integers(0, 3),
    depth=st.floats(0, 1),
)
def test_samples_fill_the_budget_and_never_exceed_it(name, length, seed, depth):
    sample = sample_of(name, length, seed=seed, depth=depth if name == BY_DEPTH else None)
    assert sample.tokens == count(sample.prompt) + TASKS[name].new_tokens
    assert 0.99 * length <= sample.tokens <= length


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2", "chat"])
@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(list(TASKS)), length=st.integers(1000, 4000))
def test_samples_fill_the_budget_of_a_real_tokenizer(model, name, length):
    """With the chat template and the answer prefix, for real prose and SmolLM2."""
    files = files_of(model)
    length *= 1 if model == "smollm2" else 7  # a byte is about a token, and `cwe` takes 6,900
    depth = 0.3 if name == BY_DEPTH else None
    sample = make_sample(TASKS[name], length, 0, 1, WHOLE, token_counter(files), depth)
    context, query = prompt_ids(files, sample.prompt)
    assert sample.tokens == len(context) + len(query) + sample.new_tokens
    assert 0.99 * length <= sample.tokens <= length
    assert files.decode(query).endswith(sample.prompt.answer_prefix)


WHOLE = Material()
_FILES: dict = {}


def files_of(model: str):
    if model not in _FILES:
        path = chat_folder() if model == "chat" else None
        _FILES[model] = find_model(ModelConfig(name="hf" if path else model, path=path))
    return _FILES[model]


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_makes_the_same_sample(name):
    depth = 0.5 if name == BY_DEPTH else None
    first, again = (sample_of(name, 1500, depth=depth) for _ in range(2))
    assert first == again
    others = [
        sample_of(name, 1500, number=1, depth=depth),
        sample_of(name, 1500, seed=1, depth=depth),
    ]
    assert len({s.prompt.digest for s in (first, *others)}) == 3


def test_samples_are_those_of_every_machine():
    """Of word lists, random numbers and wording; another digest is another benchmark."""
    digests = [
        sample_of(name, 1500, depth=0.5 if name == BY_DEPTH else None).prompt.digest
        for name in TASKS
    ]
    assert MATERIAL.words.source == "wonderwords 3.0.1"
    assert sha256(" ".join(digests).encode()).hexdigest()[:16] == "35ae47615be5f113"


@pytest.mark.parametrize("name", RULER)
def test_too_short_says_how_long_it_must_be(name):
    with pytest.raises(TooShort) as caught:
        sample_of(name, 40)
    least = caught.value.least
    sample_of(name, least + 20)  # other words at another length
    with pytest.raises(TooShort):
        sample_of(name, least - 20)


def test_counts_that_do_not_grow_evenly():
    """What is returned fits, even where one unit more takes fewer tokens."""
    uneven = [10, 20, 35, 30, 60, 55, 90]
    build = lambda units, tail: Prompt("x" * uneven[min(units, 6)] + tail, "", "")  # noqa: E731
    draft = Draft(build, lambda number: "", ())
    prompt, tokens = fill(draft, 57, lambda prompt: len(prompt.document))
    assert tokens == len(prompt.document) <= 57


# -- texts and scores ----------------------------------------------------------------------------


def test_the_default_essay_is_prose():
    essay = default_essay()
    assert len(essay.sentences) > 300
    assert all(re.match("[A-Z]", s) and s[-1] in ".!?" for s in essay.sentences)
    assert not any(re.search(r"\d|\s\s|>>>", s) for s in essay.sentences)
    assert "Python" in essay.source and len(essay.sha256) == 64


def test_sentences_of_an_essay():
    essay = essay_of("One.  Two?\n\nThree! 4.5 is\ta number. Ende。次の。", "x")
    assert essay.sentences == ("One.", "Two?", "Three!", "4.5 is a number.", "Ende。", "次の。")


def test_an_essay_without_full_stops_is_cut_into_pieces():
    """A needle stands between sentences, and would else be at the beginning or the end."""
    hindi = essay_of("यह एक है। वह दो है। " * 3, "x").sentences
    assert hindi == ("यह एक है।", "वह दो है।") * 3
    words, letters = "word well-known " * 100, "ก" * 1000
    for text in (words, letters):
        pieces = essay_of(text, "x").sentences
        assert len(pieces) >= 3 and max(map(len, pieces)) <= 400
        assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
    assert "well- known" not in " ".join(essay_of(words, "x").sentences)


def test_material_says_what_was_used():
    material = Material(lambda: essay_of("A b.", "file.txt"))
    assert material.sources() == {}
    _ = material.essay, material.words
    sources = material.sources()
    assert sources["essay"]["source"] == "file.txt"
    assert sources["essay"]["sha256"] == sha256(b"A b.").hexdigest()
    assert set(sources) == {"essay", "words"}


@pytest.mark.parametrize(
    ("answer", "references", "match", "want"),
    [
        ("It is 1234567.", ["1234567"], "all", 1.0),
        ("a: 1, b: 2", ["1", "2", "3", "4"], "all", 0.5),
        ("abcde FGHIJ", ["ABCDE", "fghij"], "all", 1.0),
        ("", ["x"], "all", 0.0),
        ("in Paris", ["paris", "Lyon"], "part", 1.0),
        ("in Rome", ["paris", "Lyon"], "part", 0.0),
        ("two\tlines", ["two\nlines"], "all", 1.0),
        ("x\x00y", ["x\ny"], "part", 1.0),
    ],
)
def test_scores(answer, references, match, want):
    assert score(answer, references, match) == want
