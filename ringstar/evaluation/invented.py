"""Paragraphs with questions that need no file: people and towns that do not exist.

A person's paragraph names a town, and the town's its river: where the two meet, a question takes
both.  Names occur once, so that no question has two answers.
"""

from __future__ import annotations

from hashlib import sha256
from itertools import product
from random import Random

from ringstar.evaluation.questions import Item, QuestionSet
from ringstar.evaluation.samples import seeded

PEOPLE, TOWNS = 900, 300
_FIRST = (
    *("Ada", "Anselm", "Beatrix", "Bruno", "Cecily", "Conrad", "Dagny", "Edmund", "Elspeth"),
    *("Fabian", "Greta", "Hugo", "Ingrid", "Ivo", "Jasper", "Katrin", "Lambert", "Leonie"),
    *("Magnus", "Mirela", "Nils", "Odette", "Oskar", "Petra", "Quentin", "Ragna", "Rufus"),
    *("Selma", "Sigurd", "Tilda", "Tobias", "Ulla", "Viktor", "Wilma", "Yvo", "Zelda"),
)
_LAST = (
    *("Abelsen", "Bramwell", "Corvin", "Dorn", "Eckhart", "Falkner", "Garrick", "Hallam"),
    *("Iversen", "Jessup", "Kessler", "Lindqvist", "Marchetti", "Norrby", "Ostrander"),
    *("Pemberton", "Quist", "Rasmussen", "Sorrel", "Thackeray", "Ulvang", "Vandermeer"),
    *("Whitlock", "Yarrow", "Zimmer", "Ashdown", "Berglund", "Castellan", "Dunmore"),
)
_TOWN = (
    ("Ald", "Brack", "Cran", "Dun", "Elm", "Fen", "Glen", "Harr", "Kirk", "Lang", "Mar", "Nor"),
    ("er", "ing", "en", "el"),
    ("bury", "ford", "gate", "haven", "mouth", "stead", "wick", "worth"),
)
_RIVER = (
    ("Ar", "Bel", "Cal", "Dov", "Ess", "Gar", "Hes", "Isk", "Lor", "Mer", "Ol", "Tam"),
    ("a", "e", "i", "o", "u"),
    ("ba", "dra", "lis", "mer", "na", "ra", "ssa", "va"),
)
_TRADE = (
    *("glassblower", "cartographer", "bell founder", "botanist", "shipwright", "engraver"),
    *("clockmaker", "organist", "astronomer", "bookbinder", "surveyor", "printer", "weaver"),
    *("apothecary", "sculptor", "lighthouse keeper", "geologist", "violin maker", "potter"),
)
_KNOWN_FOR = ("its salt market", "its stone bridge", "its apple fair", "its bell tower")
_MADE_OF = ("grey slate", "red brick", "white limestone", "dark oak")
_ANIMALS = ("a spaniel", "two parrots", "a grey donkey", "a tortoise", "several goats")


def invented_questions() -> QuestionSet:
    """The same paragraphs and questions everywhere."""
    draw = seeded("invented paragraphs")
    towns = draw.sample([*map("".join, product(*_TOWN))], TOWNS)
    rivers = draw.sample([*map("".join, product(*_RIVER))], TOWNS)
    people = draw.sample([" ".join(pair) for pair in product(_FIRST, _LAST)], PEOPLE)
    about = {town: _town(draw, town, river) for town, river in zip(towns, rivers, strict=True)}
    river_of = dict(zip(towns, rivers, strict=True))
    items: list[Item] = []
    for person in people:
        town = draw.choice(towns)
        items += _person(draw, person, town, river_of[town], about[town])
    every = tuple(dict.fromkeys([*(i.paragraphs[0] for i in items), *about.values()]))
    digest = sha256("\n".join(every).encode()).hexdigest()
    return QuestionSet(tuple(items), every, "invented people and towns", digest)


def _town(draw: Random, town: str, river: str) -> str:
    year = draw.randrange(1102, 1690)
    return (
        f"{town} is a town on the river {river}. It was granted its charter in {year} and is known"
        f" for {draw.choice(_KNOWN_FOR)}, which is held to be older than the charter. Most of the"
        f" houses in the old quarter are built of {draw.choice(_MADE_OF)}, and the railway reached"
        f" the town in {draw.randrange(1841, 1899)}."
    )


def _person(draw: Random, name: str, town: str, river: str, about_town: str) -> list[Item]:
    """A question about the trade, the town or the year, and one that takes the town's too."""
    trade, born = draw.choice(_TRADE), draw.randrange(1702, 1910)
    surname = name.split()[1]
    text = (
        f"{name} was a {trade} who was born in {town} in {born}. After an apprenticeship of"
        f" {draw.randrange(3, 9)} years {surname} opened a workshop of some renown, kept"
        f" {draw.choice(_ANIMALS)}, and left {draw.randrange(12, 60)} notebooks, which were found"
        f" in an attic a long time afterwards."
    )
    one = draw.choice(
        (
            (f"What was the trade of {name}?", trade),
            (f"In which town was {name} born?", town),
            (f"In which year was {name} born?", str(born)),
        )
    )
    two = f"On which river lies the town in which {name} was born?"
    return [Item(one[0], (one[1],), (text,)), Item(two, (river,), (text, about_town))]
