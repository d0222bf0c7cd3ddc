"""Facts to plant in a document: short, told apart by what they are about, and not in it yet.

A small model mixes up facts of one kind ("the code of A is …, the code of B is …") even when it
sees all of them; so every fact is of another kind for as long as there are kinds left.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ringstar.errors import UserError


@dataclass(frozen=True, slots=True)
class Fact:
    """A sentence, what is asked about it, and what a right answer holds."""

    attribute: str
    owner: str
    value: str

    @property
    def sentence(self) -> str:
        return f"The {self.attribute} of the {self.owner} is {self.value}."

    @property
    def expected(self) -> str:
        """The part of the value that a right answer holds: a unit may be written otherwise."""
        return self.value.split()[0] if self.value[0].isdigit() else self.value

    @property
    def question(self) -> str:
        return f"According to the text above, what is the {self.attribute} of the {self.owner}?"


# an attribute, who or what has it, and values: at least as many as owners
_KINDS = (
    (
        "favorite color",
        ("gardener", "opera singer", "blacksmith", "young prince"),
        ("turquoise", "crimson", "lavender", "olive green", "ivory", "maroon"),
    ),
    (
        "phone number",
        ("harbor office", "flower shop", "mountain hotel", "ice rink"),
        ("555-0142", "555-0187", "555-0119", "555-0163", "555-0175", "555-0138"),
    ),
    (
        "favorite food",
        ("elephant", "parrot", "mayor", "ferryman"),
        ("watermelon", "pumpkin soup", "roasted chestnuts", "lentils", "rhubarb pie", "figs"),
    ),
    (
        "home town",
        ("violin teacher", "goalkeeper", "watchmaker", "pastry chef"),
        ("Lisbon", "Trondheim", "Valparaiso", "Kyoto", "Dunedin", "Krakow"),
    ),
    (
        "nickname",
        ("old captain", "stable boy", "chess champion", "night watchman"),
        ("Thunderbird", "Pepperpot", "Silverfox", "Moonbeam", "Bulldog", "Sparrow"),
    ),
    (
        "price",
        ("red bicycle", "oak wardrobe", "silver teapot", "wool carpet"),
        ("340 dollars", "275 dollars", "615 dollars", "480 dollars", "925 dollars", "735 dollars"),
    ),
    (
        "birthday",
        ("librarian", "twin sister", "lighthouse keeper", "tailor"),
        ("March 12", "October 27", "June 19", "August 14", "January 23", "April 16"),
    ),
    (
        "room number",
        ("clock museum", "piano lesson", "botany lecture", "debating club"),
        ("4817", "3926", "7254", "6183", "9541", "8362"),
    ),
    (
        "mascot",
        ("football club", "fire brigade", "brass band", "sailing school"),
        ("hedgehog", "flamingo", "otter", "giraffe", "walrus", "badger"),
    ),
    (
        "surname",
        ("baker", "flute player", "miller", "swimming coach"),
        ("Okafor", "Lindqvist", "Moretti", "Yamada", "Petrov", "Dubois"),
    ),
    (
        "password",
        ("castle gate", "secret garden", "treasure room", "boat house"),
        ("marigold", "cinnamon", "snowflake", "butterscotch", "dragonfly", "honeycomb"),
    ),
    (
        "weight",
        ("bronze bell", "marble statue", "fishing boat", "millstone"),
        ("920 kilograms", "745 kilograms", "380 kilograms", "560 kilograms", "615 kilograms"),
    ),
    (
        "favorite instrument",
        ("dentist", "bus driver", "ballet dancer", "shepherd"),
        ("harp", "trombone", "accordion", "cello", "banjo", "clarinet"),
    ),
    (
        "destination",
        ("night train", "hot air balloon", "school trip", "royal yacht"),
        ("Geneva", "Marrakesh", "Reykjavik", "Salzburg", "Naples", "Tallinn"),
    ),
    (
        "age",
        ("oldest oak tree", "giant tortoise", "stone bridge", "village inn"),
        ("612 years", "187 years", "243 years", "158 years", "431 years", "274 years"),
    ),
)
MOST = sum(len(owners) for _, owners, _ in _KINDS)


def make_facts(trial: int, count: int, text: str) -> list[Fact]:
    """`count` facts that `text` does not hold; other trials give others in another order.

    Raises UserError if the text holds so many of them that too few are left.
    """
    facts = list(_absent(random.Random(f"facts {trial}"), text.lower()))
    if len(facts) < count:
        why = (
            f"the document already speaks of the facts that would be planted; at most {len(facts)}"
        )
        raise UserError("compare.needles", count, why)
    return facts[:count]


def _absent(draw: random.Random, text: str) -> Iterator[Fact]:
    kinds = draw.sample(_KINDS, len(_KINDS))
    drawn = [
        (attribute, draw.sample(owners, len(owners)), draw.sample(values, len(values)))
        for attribute, owners, values in kinds
    ]
    for turn in range(max(len(owners) for _, owners, _ in drawn)):
        for attribute, owners, values in drawn:
            fact = Fact(attribute, owners[turn], values[turn])
            said = f"{attribute} of the {fact.owner}"
            if said not in text and fact.value.lower() not in text:
                yield fact
