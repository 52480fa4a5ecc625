"""Arithmetic word problems with worked steps: one to three operations on integers up to 30.

The answer spells out every step and ends with `#### N`, as GSM8K's references do. The problem's key is its chain of
operations, so a held-out chain was never trained on under any wording.
"""

import random
import re

from dllmquant.tasks.items import Item

NAMES = ("tom", "anna", "ben", "lucy", "omar", "mia", "jack", "nora", "paul", "rita", "sam", "vera")
THINGS = ("apples", "coins", "books", "pens", "cards", "shells", "stamps", "eggs", "toys", "cups", "nuts", "beads")
LARGEST = 30

_STARTS = ("{name} has {a} {things}.", "{name} starts with {a} {things}.", "{name} has a box of {a} {things}.")
_STEPS = {
    "+": ("{name} buys {b} more.", "{other} gives {name} {b} more.", "{name} finds {b} {things}."),
    "-": ("{name} gives {b} to {other}.", "{name} loses {b} of them.", "{name} sells {b} {things}."),
    "*": ("{name} gets {b} times as many.", "the number grows {b} times."),
    "/": ("{name} keeps one of {b} parts.", "one of {b} parts is left."),
}
_QUESTIONS = ("how many {things} now?", "how many {things} does {name} have?", "how many remain?")


def make_item(rng: random.Random) -> Item:
    """Draws a word problem; prompt and answer are at most 46 and 31 tokens of the bundled tokenizer."""
    length = rng.choices((1, 2, 3), weights=(3, 4, 3))[0]
    value = rng.randint(2, 20)
    words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS)}
    words["other"] = rng.choice([name for name in NAMES if name != words["name"]])
    sentences = [rng.choice(_STARTS).format(a=value, **words)]
    worked, key = [], str(value)
    for _ in range(length):
        operation, operand = _draw_operation(value, rng)
        result = _apply(value, operation, operand)
        worked.append(f"{value}{operation}{operand}={result}.")
        sentences.append(rng.choice(_STEPS[operation]).format(b=operand, **words))
        key += f"{operation}{operand}"
        value = result
    sentences.append(rng.choice(_QUESTIONS).format(**words))
    return Item(f"math {key}", f"q: {' '.join(sentences)} a:", f" {' '.join(worked)} #### {value}")


def make_drill(rng: random.Random) -> Item:
    """Draws a bare chain of two to four operations: the same arithmetic with no story, for training only.

    Its key is that of the word problems with the same chain, so drills obey the same split.
    """
    value = rng.randint(2, 20)
    worked, key = [], str(value)
    for _ in range(rng.randint(2, 4)):
        operation, operand = _draw_operation(value, rng)
        result = _apply(value, operation, operand)
        worked.append(f"{value}{operation}{operand}={result}.")
        key += f"{operation}{operand}"
        value = result
    return Item(f"math {key}", f"q: {key} a:", f" {' '.join(worked)}")


def extract_answer(completion: str) -> str | None:
    """Returns the number after the first `####` of a completion, or None when there is none."""
    found = re.search(r"####\s*(\d+)(?!\d)", completion)
    return found.group(1) if found else None


def _draw_operation(value: int, rng: random.Random) -> tuple[str, int]:
    """Draws an operation that keeps the running value an integer in [1, 30]."""
    options: list[tuple[str, list[int]]] = [
        ("+", list(range(1, min(9, LARGEST - value) + 1))),
        ("-", list(range(1, min(9, value - 1) + 1))),
        ("*", [k for k in range(2, 4) if value * k <= LARGEST]),
        ("/", [k for k in range(2, 4) if value % k == 0]),
    ]
    operation, operands = rng.choice([option for option in options if option[1]])
    return operation, rng.choice(operands)


def _apply(value: int, operation: str, operand: int) -> int:
    match operation:
        case "+":
            return value + operand
        case "-":
            return value - operand
        case "*":
            return value * operand
        case _:
            return value // operand
