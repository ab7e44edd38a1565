"""A synthetic encyclopedia: things, the relations between them, a page for each, and the questions that follow.

Everything follows from one seed. A page's title is the name and the kind of a thing, ``Arlen (city)``; names are reused
across kinds, so that a name alone does not lead to its page. Texts write each thing as ``the city Arlen``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from agentrl.errors import UserError

MIN_PAGES, MAX_PAGES = 200, 20_000


@dataclass(frozen=True, slots=True)
class Relation:
    """A fact that each thing of some kinds has one of."""

    noun: str
    """As questions write it: ``the author of ...``."""
    target: str | None
    """Kind of thing it leads to, ``person`` for any; None: a plain value, which ends a question."""
    wordings: tuple[str, ...]
    """Sentences of pages; ``{}`` is the thing or value."""


AUTHOR = Relation("author", "novelist", ("It was written by {}.", "Its author is {}.", "{} wrote it in a single year."))
PUBLISHER = Relation("publisher", "company", ("It was published by {}.", "{} brought it out."))
PUBLICATION_YEAR = Relation("publication year", None, ("It first appeared in {}.", "The first edition is dated {}."))
BIRTHPLACE = Relation("birthplace", "city", ("Born in {}.", "A native of {}.", "{} is the place of birth."))
SPOUSE = Relation("spouse", "person", ("Married to {}.", "The wedding with {} drew crowds."))
UNIVERSITY = Relation("alma mater", "university", ("Studied at {}.", "A degree from {} came first."))
FOUNDER = Relation("founder", "engineer", ("It was founded by {}.", "{} set it up in a shed."))
HEADQUARTERS = Relation("seat", "city", ("Its offices stand in {}.", "It is run from {}."))
FOUNDING_YEAR = Relation("founding year", None, ("It goes back to {}.", "The founding charter was signed in {}."))
RECTOR = Relation("rector", "chemist", ("It is led by {}.", "{} became rector after a close vote."))
COUNTRY = Relation("country", "country", ("It lies in {}.", "It belongs to {}."))
RIVER = Relation("river", "river", ("The water under its bridges is that of {}.", "It grew up on the banks of {}."))
MAYOR = Relation("mayor", "politician", ("The town hall is in the hands of {}.", "{} was elected mayor."))
CAPITAL = Relation("capital", "city", ("It is governed from {}.", "{} is where its parliament sits."))
CURRENCY = Relation("currency", None, ("People pay with the {}.", "Its coin is the {}."))
LENGTH = Relation("length in kilometres", None, ("It runs for {} kilometres.", "Its course measures {} kilometres."))

PEOPLE = ("novelist", "engineer", "chemist", "politician")
RELATIONS: dict[str, tuple[Relation, ...]] = {
    "novel": (AUTHOR, PUBLISHER, PUBLICATION_YEAR),
    **dict.fromkeys(PEOPLE, (BIRTHPLACE, SPOUSE, UNIVERSITY)),
    "company": (FOUNDER, HEADQUARTERS, FOUNDING_YEAR),
    "university": (RECTOR, HEADQUARTERS, FOUNDING_YEAR),
    "city": (COUNTRY, RIVER, MAYOR),
    "country": (CAPITAL, CURRENCY),
    "river": (LENGTH,),
}
"""Kind of thing -> the relations it has."""
_SHARES = {
    "novel": 0.26,
    **dict.fromkeys(PEOPLE, 0.11),
    "company": 0.09,
    "university": 0.04,
    "city": 0.12,
    "country": 0.01,
    "river": 0.04,
}


def _words(text: str) -> list[str]:
    return text.split()


_ONSETS = _words("b br c d dr f g gr h k l m n p r s st t th v")
_RHYMES = _words("a al an ar e el en er i il in ir o ol on or u ul un ur")
_ENDS = _words("da den dor field ford gard ham la lin mar mere mond na ra ris sa ton va vik wick")
_FIRST = _words("""Ada Alma Anton Bela Bruno Carla Cora Dario Edda Elias Emil Erna Felix Flora Greta Hanno Hugo Ida Igor
Ines Ivo Jana Jonas Jutta Kasper Klara Lena Leo Lida Magda Marek Mira Nils Nora Olga Oskar Paula Petra Rafael Rosa Ruben
Selma Simon Stella Tessa Tilda Timo Ulla Viktor Wanda Xaver Yara Zeno""")
_ADJECTIVES = _words("""Amber Bitter Borrowed Broken Burning Crooked Distant Drowned Empty Endless Faded Fallen
Forgotten Frozen Gilded Hidden Hollow Honest Iron Last Lonely Lost Paper Patient Quiet Restless Salt Second Silent
Silver Sleeping Small Stolen Stubborn Sunken Tender Twisted Velvet Wandering Winter""")
_NOUNS = _words("""Anchor Archive Atlas Bell Bridge Candle Cartographer Clock Compass Crown Cypress Ferry Garden Harbour
Heron Island Key Ladder Lantern Letter Lighthouse Meadow Mirror Mountain Orchard Oven Piano Promise Raven Room Sailor
Season Shadow Station Summer Tailor Tower Voyage Well Window""")
_PARTS = _words("Two Three Four Five Six")
_TRADES = _words("Instruments Mills Motors Press Shipyards Steel Textiles Tools")


@dataclass(frozen=True, slots=True)
class Thing:
    """A thing with a page."""

    name: str
    kind: str

    @property
    def title(self) -> str:
        return f"{self.name} ({self.kind})"

    @property
    def mention(self) -> str:
        """How texts write it."""
        return f"the {self.kind} {self.name}"


Fact = Thing | str


@dataclass(frozen=True)
class Question:
    """A chain of relations from a start to its answer."""

    start: Thing
    relations: tuple[Relation, ...]
    """In the order of the hops."""
    answer: Fact

    @property
    def text(self) -> str:
        chain = "".join(f"the {relation.noun} of " for relation in reversed(self.relations))
        who = "Who" if isinstance(self.answer, Thing) and self.answer.kind in PEOPLE else "What"
        return f"{who} is {chain}{self.start.mention}?"

    @property
    def golds(self) -> tuple[str, ...]:
        """Answers that count: the name, alone or with its kind."""
        answer = self.answer
        return (answer,) if isinstance(answer, str) else (answer.name, answer.title, answer.mention)


class World:
    """All things, facts and pages of one seed. Made by `build_world`; never changed afterwards, so threads share it."""

    def __init__(self, seed: int, pages: int) -> None:
        rng = random.Random(f"search-qa {seed} {pages}")
        places = rng.sample(_PLACES, round(0.15 * pages))  # hardly more than cities, so that kinds share their names
        self.things = {kind: _things(kind, max(4, round(pages * n)), places, rng) for kind, n in _SHARES.items()}
        self.things["person"] = [thing for kind in PEOPLE for thing in self.things[kind]]
        self.everything = [thing for kind in _SHARES for thing in self.things[kind]]
        self.facts = {thing: self._facts_of(thing, rng) for thing in self.everything}
        self.pages = {thing.title: self._page(thing, rng) for thing in self.everything}
        self.titles = list(self.pages)

    def chains(self, start: Thing, hops: int) -> list[Question]:
        """Returns all questions of so many hops from `start` that visit no thing twice."""
        found: list[Question] = []

        def walk(at: Fact, seen: tuple[Fact, ...], path: tuple[Relation, ...]) -> None:
            if len(path) == hops:
                found.append(Question(start, path, at))
            elif isinstance(at, Thing):
                for relation, value in self.facts[at].items():
                    if value not in seen:
                        walk(value, (*seen, value), (*path, relation))

        walk(start, (start,), ())
        return found

    def _facts_of(self, thing: Thing, rng: random.Random) -> dict[Relation, Fact]:
        def draw(relation: Relation) -> Fact:
            if relation.target is None:
                return _value(relation, rng)
            while (other := rng.choice(self.things[relation.target])) == thing:
                pass
            return other

        return {relation: draw(relation) for relation in RELATIONS[thing.kind]}

    def _page(self, thing: Thing, rng: random.Random) -> str:
        sentences = []
        for relation, value in self.facts[thing].items():
            said = value.mention if isinstance(value, Thing) else value
            sentence = rng.choice(relation.wordings).format(said)
            sentences.append(sentence[0].upper() + sentence[1:])
        rng.shuffle(sentences)
        article = "an" if thing.kind[0] in "aeio" else "a"
        return " ".join([f"{thing.name} is {article} {thing.kind}.", *sentences])


@lru_cache(maxsize=4)
def build_world(seed: int = 0, pages: int = 3000) -> World:
    """Returns the world of a seed with about so many pages, kept for the next call.

    Raises:
        UserError: `pages` outside `MIN_PAGES`..`MAX_PAGES`.
    """
    if not MIN_PAGES <= pages <= MAX_PAGES:
        raise UserError(f"pages={pages}: {MIN_PAGES} to {MAX_PAGES}")
    return World(seed, pages)


def _things(kind: str, count: int, places: list[str], rng: random.Random) -> list[Thing]:
    """Draws things with different names."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[_name(kind, places, rng)] = None
    return [Thing(name, kind) for name in names]


def _name(kind: str, places: list[str], rng: random.Random) -> str:
    if kind == "novel":
        # A fourth belong to a series, for 1,600 titles are not enough for the largest worlds.
        part = f", Book {rng.choice(_PARTS)}" if rng.random() < 0.25 else ""
        return f"The {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}{part}"
    place = rng.choice(places)
    if kind in PEOPLE:
        return f"{rng.choice(_FIRST)} {place}"
    return f"{place} {rng.choice(_TRADES)}" if kind == "company" else place


def _value(relation: Relation, rng: random.Random) -> str:
    if relation is CURRENCY:
        return rng.choice(_PLACES)[:4].lower() + rng.choice(["ar", "in", "ot", "um"])
    if relation is LENGTH:
        return str(rng.randint(30, 1900))
    return str(rng.randint(1702, 2019))


def _places() -> Iterator[str]:
    for onset, rhyme, end in product(_ONSETS, _RHYMES, _ENDS):
        yield (onset + rhyme + end).capitalize()


_PLACES = random.Random("places").sample(sorted(set(_places())), 4000)
"""Names of places, and surnames."""
