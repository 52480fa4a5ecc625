"""Program execution: short list and string programs in Python, answered with what they print.

Every statement is real Python; the reference output is computed with the same list and string methods. The digits of a
value are distinct, so that what follows what is well defined.
"""

import random
from collections.abc import Callable

from dllmquant.tasks.items import Item

# What a program may print, with what it evaluates to.
_LIST_RESULTS: dict[str, Callable[[list[int]], object]] = {
    "x": lambda x: x,
    "x[::-1]": lambda x: x[::-1],
    "sorted(x)": sorted,
    "x[0]": lambda x: x[0],
    "x[-1]": lambda x: x[-1],
    "len(x)": len,
    "max(x)": max,
    "min(x)": min,
}
_STRING_RESULTS: dict[str, Callable[[str], object]] = {
    "s": lambda s: s,
    "s[::-1]": lambda s: s[::-1],
    "s[1:]": lambda s: s[1:],
    "s[:-1]": lambda s: s[:-1],
    "s * 2": lambda s: s * 2,
    "s[0]": lambda s: s[0],
    "s[-1]": lambda s: s[-1],
    "len(s)": len,
}


def make_item(rng: random.Random) -> Item:
    """Draws a program of two or three statements and its output."""
    program, output = (_list_program if rng.random() < 0.6 else _string_program)(rng)
    return Item(f"code {program}", f"code: {program} prints:", f" {output}")


def _list_program(rng: random.Random) -> tuple[str, str]:
    values = rng.sample(range(10), rng.randint(3, 5))
    lines = [f"x = {values}"]
    if rng.random() < 0.6:
        lines.append(_change_list(values, rng))
    last = rng.choices(tuple(_LIST_RESULTS), weights=(8, 4, 4, 1, 1, 1, 1, 1))[0]
    return f"{'; '.join(lines)}; print({last})", str(_LIST_RESULTS[last](values))


def _change_list(values: list[int], rng: random.Random) -> str:
    """Applies a random statement to `values` in place and returns its source."""
    new = rng.choice([digit for digit in range(10) if digit not in values])
    match rng.choice(("append", "reverse", "sort", "pop", "set", "insert")):
        case "append":
            values.append(new)
            return f"x.append({new})"
        case "reverse":
            values.reverse()
            return "x.reverse()"
        case "sort":
            values.sort()
            return "x.sort()"
        case "pop":
            values.pop()
            return "x.pop()"
        case "set":
            index = rng.randrange(len(values))
            values[index] = new
            return f"x[{index}] = {new}"
        case _:
            values.insert(0, new)
            return f"x.insert(0, {new})"


def _string_program(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.sample("0123456789", rng.randint(3, 5)))
    lines = [f's = "{text}"']
    for _ in range(rng.randint(0, 1)):
        text, line = _change_string(text, rng)
        lines.append(line)
    last = rng.choices(tuple(_STRING_RESULTS), weights=(4, 3, 2, 2, 2, 1, 1, 1))[0]
    return f"{'; '.join(lines)}; print({last})", str(_STRING_RESULTS[last](text))


def _change_string(text: str, rng: random.Random) -> tuple[str, str]:
    """Returns the string after a random statement, and the statement's source."""
    new = rng.choice([digit for digit in "0123456789" if digit not in text])
    match rng.choice(("append", "prepend", "reverse", "replace")):
        case "append":
            return text + new, f's = s + "{new}"'
        case "prepend":
            return new + text, f's = "{new}" + s'
        case "reverse":
            return text[::-1], "s = s[::-1]"
        case _:
            old = rng.choice(text)
            return text.replace(old, new), f's = s.replace("{old}", "{new}")'
