"""A small multi-hop data set in HotpotQA's format, about a made-up world. It needs no network, and no model knows it.

`python -m mulligan.env.envs.hotpotqa.world FOLDER` writes it to files with the official names. The same seed gives
the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAIN_FILE = "hotpot_train_v1.1.json"
TEST_FILE = "hotpot_dev_distractor_v1.json"
FULLWIKI_FILE = "hotpot_dev_fullwiki_v1.json"
TRAIN_QUESTIONS = 1_000
TEST_QUESTIONS = 100
_PARAGRAPHS = 10  # of a question, as in the distractor setting
_TOWNS = 120
_PEOPLE = 400
_FIRMS = 200
_BOOKS = 300

_ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w", "z")
_VOWELS = ("a", "e", "i", "o", "u", "ae", "ei", "ou")
_CODAS = ("l", "m", "n", "r", "s", "th", "rn", "ld", "nd", "sk")
_REGIONS = ("the Amber Coast", "Upper Sarn", "Lower Sarn", "the Ninefold Hills", "Vestmark", "the Salt Plains")
_TRADES = ("painter", "engineer", "botanist", "composer", "surveyor", "chemist", "architect", "historian")
_GOODS = ("glass", "clocks", "looms", "sailcloth", "porcelain", "lanterns", "compasses", "ink")
_SUFFIXES = ("Works", "Company", "Brothers", "Manufactory", "Guild")
_KINDS = ("novel", "play", "collection of poems", "travel account")
_NOUNS = ("Orchard", "Lighthouse", "Harbour", "Winter", "Mirror", "Garden", "Bridge", "Letter", "Island", "Clock")
_ADJECTIVES = ("Silent", "Copper", "Last", "Hidden", "Northern", "Paper", "Second", "Burning", "Hollow", "Blue")


@dataclass(frozen=True, slots=True)
class Town:
    name: str
    region: str
    river: str
    founded: int
    inhabitants: int

    @property
    def sentences(self) -> list[str]:
        return [
            f"{self.name} is a town in {self.region}.",
            f" It lies on the river {self.river} and was founded in {self.founded}.",
            f" It has {self.inhabitants:,} inhabitants.",
        ]


@dataclass(frozen=True, slots=True)
class Person:
    name: str
    trade: str
    born: int
    town: Town
    teacher: str  # a person's name; empty for the eldest

    @property
    def sentences(self) -> list[str]:
        article = "an" if self.trade[0] in "aeiou" else "a"
        taught = f" {self.name} was a pupil of {self.teacher}." if self.teacher else f" {self.name} had no teacher."
        return [
            f"{self.name} (born {self.born}), {article} {self.trade}, came from {self.town.name}.",
            taught,
            f" Most that is known of this {self.trade} comes from letters.",
        ]


@dataclass(frozen=True, slots=True)
class Firm:
    name: str
    goods: str
    founder: Person
    seat: Town
    founded: int

    @property
    def sentences(self) -> list[str]:
        return [
            f"{self.name} is a maker of {self.goods} with its seat in {self.seat.name}.",
            f" It was founded in {self.founded} by {self.founder.name}.",
        ]


@dataclass(frozen=True, slots=True)
class Book:
    name: str
    kind: str
    author: Person
    published: int

    @property
    def sentences(self) -> list[str]:
        return [
            f"{self.name} is a {self.kind} by {self.author.name}.",
            f" It was published in {self.published} and has been reprinted often.",
        ]


Entity = Town | Person | Firm | Book
Fact = tuple[Entity, int]  # a sentence of an entity's paragraph


@dataclass(frozen=True, slots=True)
class _Asked:
    question: str
    answer: str
    kind: str  # bridge or comparison
    level: str  # easy: both paragraphs are named; medium: one leads to the other; hard: over three paragraphs
    facts: tuple[Fact, ...]


class World:
    def __init__(self, seed: int) -> None:
        rng = random.Random(f"world/{seed}")
        names = _names(rng)
        self.towns = [
            Town(next(names), rng.choice(_REGIONS), next(names), rng.randint(900, 1650), rng.randint(2, 90) * 1_000)
            for _ in range(_TOWNS)
        ]
        self.people: list[Person] = []
        for _ in range(_PEOPLE):
            name = f"{next(names)} {next(names)}"
            born = rng.randint(1700, 1860)
            older = [person.name for person in self.people if 15 <= born - person.born <= 60]
            teacher = rng.choice(older) if older else ""
            self.people.append(Person(name, rng.choice(_TRADES), born, rng.choice(self.towns), teacher))
        self.firms = [self._firm(rng, next(names)) for _ in range(_FIRMS)]
        self.books = [self._book(rng, next(names)) for _ in range(_BOOKS)]
        self.by_name = {person.name: person for person in self.people}
        self.entities: list[Entity] = [*self.towns, *self.people, *self.firms, *self.books]

        self.of_kind: dict[type[Entity], Sequence[Entity]] = {
            Town: self.towns,
            Person: self.people,
            Firm: self.firms,
            Book: self.books,
        }

    def _firm(self, rng: random.Random, name: str) -> Firm:
        founder = rng.choice(self.people)
        goods = rng.choice(_GOODS)
        founded = founder.born + rng.randint(22, 60)
        return Firm(f"{name} {rng.choice(_SUFFIXES)}", goods, founder, rng.choice(self.towns), founded)

    def _book(self, rng: random.Random, name: str) -> Book:
        author = rng.choice(self.people)
        title = f"The {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)} of {name}"
        return Book(title, rng.choice(_KINDS), author, author.born + rng.randint(20, 60))


def data_sets(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test questions. A hash of the text decides which are test questions."""
    world = World(seed)
    rng = random.Random(f"questions/{seed}")
    found: dict[bool, dict[str, dict[str, Any]]] = {False: {}, True: {}}
    wanted = {False: TRAIN_QUESTIONS, True: TEST_QUESTIONS}
    while any(len(found[test]) < wanted[test] for test in found):
        asked = rng.choice(_TEMPLATES)(world, rng)
        digest = hashlib.sha256(asked.question.encode()).digest()
        records = found[digest[0] % 8 == 0]
        if len(records) < wanted[digest[0] % 8 == 0] and asked.question not in records:
            records[asked.question] = _record(asked, digest.hex()[:24], world, rng)
    return list(found[False].values()), list(found[True].values())


def write(folder: Path, seed: int = 0) -> None:
    """The official files: training, development in the distractor and in the fullwiki setting. In the latter the
    paragraphs are what a search found, the right ones or not."""
    train, test = data_sets(seed)
    rng = random.Random(f"fullwiki/{seed}")
    entities = World(seed).entities
    retrieved = [record | {"context": _context(rng.sample(entities, _PARAGRAPHS))} for record in test]
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in ((TRAIN_FILE, train), (TEST_FILE, test), (FULLWIKI_FILE, retrieved)):
        (folder / name).write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")


def passages(seed: int = 0) -> Iterator[tuple[str, str]]:
    """Title and text of all passages of the world."""
    for entity in World(seed).entities:
        yield entity.name, "".join(entity.sentences)


def _names(rng: random.Random) -> Iterator[str]:
    """Names that sound alike, all different."""
    seen: set[str] = set()
    while True:
        syllables = rng.randint(1, 2)
        name = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)
        if len(name) > 3 and name not in seen:
            seen.add(name)
            yield name.capitalize()


def _birth_town(world: World, rng: random.Random) -> _Asked:
    book = rng.choice(world.books)
    question = f"From which town was the author of {book.name}?"
    return _Asked(question, book.author.town.name, "bridge", "medium", ((book, 0), (book.author, 0)))


def _founder_born(world: World, rng: random.Random) -> _Asked:
    firm = rng.choice(world.firms)
    question = f"In what year was the founder of {firm.name} born?"
    return _Asked(question, str(firm.founder.born), "bridge", "medium", ((firm, 1), (firm.founder, 0)))


def _seat_region(world: World, rng: random.Random) -> _Asked:
    firm = rng.choice(world.firms)
    question = f"In which region does {firm.name} have its seat?"
    return _Asked(question, firm.seat.region, "bridge", "medium", ((firm, 0), (firm.seat, 0)))


def _home_river(world: World, rng: random.Random) -> _Asked:
    person = rng.choice(world.people)
    question = f"On which river does the town lie that {person.name} was from?"
    return _Asked(question, person.town.river, "bridge", "medium", ((person, 0), (person.town, 1)))


def _teacher_trade(world: World, rng: random.Random) -> _Asked:
    person = rng.choice([person for person in world.people if person.teacher])
    teacher = world.by_name[person.teacher]
    question = f"What was the trade of the teacher of {person.name}?"
    return _Asked(question, teacher.trade, "bridge", "medium", ((person, 1), (teacher, 0)))


def _author_river(world: World, rng: random.Random) -> _Asked:
    book = rng.choice(world.books)
    author = book.author
    town = book.author.town
    question = f"On which river does the town lie that the author of {book.name} was from?"
    return _Asked(question, town.river, "bridge", "hard", ((book, 0), (author, 0), (town, 1)))


def _founder_teacher(world: World, rng: random.Random) -> _Asked:
    firm = rng.choice([firm for firm in world.firms if firm.founder.teacher])
    teacher = world.by_name[firm.founder.teacher]
    question = f"In what year was the teacher of the founder of {firm.name} born?"
    return _Asked(question, str(teacher.born), "bridge", "hard", ((firm, 1), (firm.founder, 1), (teacher, 0)))


def _born_earlier(world: World, rng: random.Random) -> _Asked:
    one, other = rng.sample(world.people, 2)
    while one.born == other.born:
        one, other = rng.sample(world.people, 2)
    elder = one if one.born < other.born else other
    question = f"Who was born earlier, {one.name} or {other.name}?"
    return _Asked(question, elder.name, "comparison", "easy", ((one, 0), (other, 0)))


def _same_region(world: World, rng: random.Random) -> _Asked:
    one = rng.choice(world.towns)
    same = rng.random() < 0.5
    other = rng.choice([town for town in world.towns if town != one and (town.region == one.region) == same])
    question = f"Are {one.name} and {other.name} in the same region?"
    return _Asked(question, "yes" if same else "no", "comparison", "easy", ((one, 0), (other, 0)))


_TEMPLATES = (
    _birth_town,
    _founder_born,
    _seat_region,
    _home_river,
    _teacher_trade,
    _author_river,
    _founder_teacher,
    _born_earlier,
    _same_region,
)


def _record(asked: _Asked, question_id: str, world: World, rng: random.Random) -> dict[str, Any]:
    """One record. Its context also has misleading paragraphs, about others of the same kinds."""
    gold = list(dict.fromkeys(entity for entity, _ in asked.facts))
    kinds = dict.fromkeys(type(entity) for entity in gold)
    alike = [entity for kind in kinds for entity in rng.sample(world.of_kind[kind], _PARAGRAPHS) if entity not in gold]
    entities = gold + rng.sample(alike, _PARAGRAPHS - len(gold))
    rng.shuffle(entities)
    return {
        "_id": question_id,
        "question": asked.question,
        "answer": asked.answer,
        "type": asked.kind,
        "level": asked.level,
        "supporting_facts": [[entity.name, sentence] for entity, sentence in asked.facts],
        "context": _context(entities),
    }


def _context(entities: Sequence[Entity]) -> list[list[Any]]:
    return [[entity.name, entity.sentences] for entity in entities]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m mulligan.env.envs.hotpotqa.world FOLDER")
    write(Path(sys.argv[1]))
