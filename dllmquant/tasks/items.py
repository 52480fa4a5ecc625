"""The value type of a task item and the split rule every task obeys."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_PERCENT = 10


@dataclass(frozen=True)
class Item:
    """One problem: the text given to the model, the reference text, and what scores it.

    Attributes:
        key: What identifies the problem whatever its wording; the split is a hash of it.
        prompt: Text the model sees.
        answer: Reference completion, starting with the space that separates it from the prompt.
        choices: For likelihood-scored tasks, the candidate completions in order; empty for generated answers.
        label: Index of the right choice; -1 for generated answers.
    """

    key: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    label: int = -1


ItemMaker = Callable[[random.Random], Item]


def is_held_out(key: str) -> bool:
    """Tells whether the problem `key` belongs to the held-out split: a tenth of all keys, by SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT
