"""python -m pytest tests/launch/test_models.py"""

import json

import pytest

import launch.models
import ringstar.passes
from launch.models import BOUND, CONTEXT, HEADINGS, NEW, QUERY, Verdict, judge, main, markdown
from ringstar.models import FAMILIES, SUPPORTED, TINY


def test_every_family_is_judged_and_listed():
    assert sorted(TINY) == list(FAMILIES) == list(json.loads(SUPPORTED.read_text()))
    page = launch.models.DOCS.read_text()
    for family in TINY:
        assert f"| {family} | " in page
    assert page.count("| exact |") == len(TINY) and "differs" not in page


def test_star_is_left_out_only_where_a_window_hides_part_of_the_text():
    column = HEADINGS.index("star, one block")
    rows = [line.strip("| ").split(" | ") for line in launch.models.DOCS.read_text().splitlines()]
    shown = {row[0]: row[column] for row in rows if row[0] in TINY}
    text = CONTEXT + QUERY + NEW
    hides = {family for family, own in TINY.items() if (own.get("sliding_window") or text) < text}
    assert {family for family, star in shown.items() if star == "no"} == hides
    assert all(float(star) <= BOUND for star in shown.values() if star != "no")
    verdict = judge("starcoder2")
    assert verdict.exact and verdict.star is None


def test_verdict_of_a_family_that_is_exact():
    verdict = judge("llama")
    assert verdict.exact and verdict.star is not None
    assert (verdict.model_class, verdict.features) == ("LlamaForCausalLM", "")
    assert 0 < verdict.ring < BOUND


def test_verdict_of_a_family_that_is_not(monkeypatch, capsys):
    """Sinks that are left out."""
    monkeypatch.setattr(ringstar.passes, "add_sinks", lambda out, lse, sinks: out)
    assert main(["gpt_oss"]) == 1
    assert "differs" in capsys.readouterr().out


def test_the_page_says_which_differ():
    page = markdown([Verdict("x", "X", "sinks", 1e-7, 1e-3, None, True)])
    assert "| x | sinks | 1.0e-03 | no | 1.0e-07 | differs |" in page


@pytest.mark.parametrize("words", [["--write", "llama"], ["nonesuch"]])
def test_wrong_words_are_refused(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert words[0].strip("-") in capsys.readouterr().err
