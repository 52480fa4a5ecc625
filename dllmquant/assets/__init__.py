"""Models that come with the package."""

from pathlib import Path

_ASSETS = Path(__file__).resolve().parent


def bundled_names() -> list[str]:
    """Returns the names of the bundled models."""
    return sorted(path.parent.name for path in _ASSETS.glob("*/config.json"))


def bundled(name: str) -> str:
    """Returns the directory of a bundled model: configuration, tokenizer and safetensors.

    Args:
        name: Such as "llada-tiny".

    Raises:
        ValueError: There is no bundled model of that name.
    """
    if name not in bundled_names():
        raise ValueError(f"bundled model: unknown {name!r}; valid: {', '.join(bundled_names())}")
    return str(_ASSETS / name)
