"""Checks of a `config.json` that several families share; their messages start with the family's name."""

from collections.abc import Mapping
from typing import Any


def check_variants(family: str, keys: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Checks the keys that select variants of an architecture, where they are given.

    Args:
        family: Name of the family, for the message.
        keys: Keys of a `config.json`.
        supported: What is implemented, by key; the first value is named in the message.

    Raises:
        ValueError: A key has another value.
    """
    for key, valid in supported.items():
        if key in keys and keys[key] not in valid:
            raise ValueError(f"{family} config: {key}={keys[key]!r} is not supported; valid: {valid[0]!r}")


def plain_rope_theta(
    family: str, rope_theta: float, rope_parameters: dict[str, Any] | None, rope_scaling: dict[str, Any] | None
) -> float:
    """Returns the base of rotary positions that is in force: that of the settings, or else the plain key's.

    Args:
        family: Name of the family, for the message.
        rope_theta: The plain key.
        rope_parameters: The settings as transformers 5 writes them.
        rope_scaling: Their older name.

    Raises:
        ValueError: The settings ask for scaled positions.
    """
    for name, given in (("rope_parameters", rope_parameters), ("rope_scaling", rope_scaling)):
        settings = given or {}
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default" or not set(settings) <= {"rope_type", "type", "rope_theta"}:
            raise ValueError(
                f"{family} config: {name}={given!r} is not supported; "
                "valid: None or {'rope_type': 'default', 'rope_theta': a number}"
            )
        rope_theta = settings.get("rope_theta", rope_theta)
    return float(rope_theta)
