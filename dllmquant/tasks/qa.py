"""Cloze questions with four choices, scored by likelihood: who is where, what a box holds, who owns what."""

import random

from dllmquant.tasks.items import Item
from dllmquant.tasks.math import NAMES

PLACES = ("kitchen", "garden", "office", "school", "market", "station", "library", "cellar")
COLORS = ("red", "blue", "green", "black", "white", "yellow")
OBJECTS = ("ring", "key", "lamp", "map", "drum", "rope", "clock", "flute")


def make_item(rng: random.Random) -> Item:
    """Draws a short story and a cloze whose completion it determines."""
    facts, cloze, answers, right = rng.choice((_whereabouts, _boxes, _owners))(rng)
    choices = list(answers)
    rng.shuffle(choices)
    prompt = f"read: {' '.join(facts)} so {cloze}"
    return Item(f"qa {prompt}", prompt, right, tuple(choices), choices.index(right))


def _choices(right: str, seen: list[str], pool: tuple[str, ...], rng: random.Random, phrase: str) -> list[str]:
    """The right completion and three wrong ones; wrong ones the story mentions come first."""
    others = [word for word in seen if word != right]
    others += rng.sample([word for word in pool if word not in seen], 3)
    return [phrase.format(word) for word in [right, *dict.fromkeys(others)][:4]]


def _whereabouts(rng: random.Random) -> tuple[list[str], str, list[str], str]:
    people = rng.sample(NAMES, 2)
    places = rng.sample(PLACES, 3)
    facts = [f"{people[0]} is in the {places[0]}.", f"{people[1]} is in the {places[1]}."]
    where = dict(zip(people, places, strict=False))
    if rng.random() < 0.5:
        mover = rng.choice(people)
        facts.append(f"{mover} goes to the {places[2]}.")
        where[mover] = places[2]
    asked = rng.choice(people)
    phrase = " the {}."
    return facts, f"{asked} is in", _choices(where[asked], places, PLACES, rng, phrase), phrase.format(where[asked])


def _boxes(rng: random.Random) -> tuple[list[str], str, list[str], str]:
    colors, objects = rng.sample(COLORS, 3), rng.sample(OBJECTS, 3)
    facts = [f"the {c} box holds the {o}." for c, o in zip(colors, objects, strict=True)]
    asked = rng.randrange(3)
    phrase = " the {}."
    right = objects[asked]
    return facts, f"the {colors[asked]} box holds", _choices(right, objects, OBJECTS, rng, phrase), phrase.format(right)


def _owners(rng: random.Random) -> tuple[list[str], str, list[str], str]:
    people, colors = rng.sample(NAMES, 3), rng.sample(COLORS, 3)
    thing = rng.choice(OBJECTS)
    facts = [f"{p} owns the {c} {thing}." for p, c in zip(people, colors, strict=True)]
    asked = rng.randrange(3)
    phrase = " the {} " + thing + "."
    right = colors[asked]
    return facts, f"{people[asked]} owns", _choices(right, colors, COLORS, rng, phrase), phrase.format(right)
