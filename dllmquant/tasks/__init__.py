"""Procedurally generated tasks: the data the bundled model is trained on, calibrated with and measured by.

Items are drawn lazily from a seed; whether a problem is held out is a hash of the problem itself
(`items.is_held_out`), so the splits are disjoint by construction, whatever their sizes.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

from datasets import Features, IterableDataset, List, Value

from dllmquant.tasks import code, math, qa
from dllmquant.tasks.items import Item, ItemMaker, is_held_out

Split = Literal["train", "heldout"]
TASKS: dict[str, ItemMaker] = {"math": math.make_item, "code": code.make_item, "qa": qa.make_item}

_FEATURES = Features(
    {
        "key": Value("string"),
        "prompt": Value("string"),
        "answer": Value("string"),
        "choices": List(Value("string")),
        "label": Value("int64"),
    }
)


def iterate(task: str, split: Split, seed: int = 0) -> Iterator[Item]:
    """Yields an endless stream of items of one split; held-out items do not repeat.

    Args:
        task: "math", "code" or "qa".
        split: "train" or "heldout".
        seed: Seed of the stream.

    Raises:
        ValueError: The task or the split is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"task: unknown {task!r}; valid: {', '.join(TASKS)}")
    if split not in ("train", "heldout"):
        raise ValueError(f"split: unknown {split!r}; valid: train, heldout")
    return _stream(task, split, seed)


def _stream(task: str, split: Split, seed: int) -> Iterator[Item]:
    rng = random.Random(f"{task} {split} {seed}")
    seen: set[str] = set()
    while True:
        item = TASKS[task](rng)
        if is_held_out(item.key) != (split == "heldout"):
            continue
        if split == "heldout":
            if item.key in seen:
                continue
            seen.add(item.key)
        yield item


def take(task: str, split: Split, count: int, seed: int = 0) -> list[Item]:
    """Returns the first `count` items of a split; see `iterate`."""
    return list(itertools.islice(iterate(task, split, seed), count))


def _rows(task: str, split: Split, count: int, seed: int) -> Iterator[dict[str, Any]]:
    for item in itertools.islice(iterate(task, split, seed), count):
        yield {**asdict(item), "choices": list(item.choices)}


def load(task: str, split: Split, count: int, seed: int = 0) -> IterableDataset:
    """Returns `count` items of a split as a lazily generated `datasets.IterableDataset`.

    Columns: key, prompt, answer, choices (empty for generated answers), label (-1 for generated answers).

    Raises:
        ValueError: The task or the split is unknown.
    """
    iterate(task, split, seed)
    kwargs = {"task": task, "split": split, "count": count, "seed": seed}
    return IterableDataset.from_generator(_rows, features=_FEATURES, gen_kwargs=kwargs)
