"""What a `generate_until` request of lm-eval means to a diffusion sampler.

A request carries keyword arguments that were made for autoregressive models. They become sampler settings:

- `max_gen_toks` (or `max_new_tokens`, `max_tokens`, `max_completion_tokens`) is the longest answer. A diffusion model
  decodes a canvas of a fixed length, so the canvas is that length rounded up to whole blocks, its steps are in the
  proportion of the checkpoint's own settings, and the answer is cut to `max_gen_toks` tokens. In block diffusion the
  canvas has that length, and the steps of a block stay the checkpoint's. From uniform noise (DiffusionGemma) as many
  canvases are decoded as hold it.
- `do_sample: false` is temperature 0, whatever `temperature` says.
- The name of a sampler setting (as in `--gen_kwargs steps=64`) is that setting.
- `until` are the texts that end the answer.

Settings chosen for the whole run come first: with `gen_length` among them the canvas has that length, and
`max_gen_toks` has no effect.
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllmquant.decoding import AnySamplerConfig, BlockDiffusionSamplerConfig, UniformNoiseSamplerConfig

_LOGGER = logging.getLogger(__name__)

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings of autoregressive decoding, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (None, 1),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1),
}
_SAMPLING_ONLY = ("top_p", "top_k", "min_p")


@dataclass(frozen=True)
class GenerationOptions:
    """A request's keyword arguments as a diffusion sampler takes them.

    Attributes:
        stops: Texts that end the answer, none empty.
        max_tokens: Tokens of the answer that count; None for all.
        settings: Sampler settings that differ from the checkpoint's, by name, sorted.
    """

    stops: tuple[str, ...]
    max_tokens: int | None
    settings: tuple[tuple[str, Any], ...]


def read_options(
    gen_kwargs: Mapping[str, Any], chosen: Mapping[str, Any], default: AnySamplerConfig, known: Collection[str]
) -> GenerationOptions:
    """Reads the keyword arguments of a request.

    Args:
        gen_kwargs: The keyword arguments.
        chosen: Sampler settings of the whole run; they come first.
        default: The checkpoint's settings.
        known: Names of sampler settings.

    Raises:
        ValueError: An argument is unknown, or asks for something the sampler cannot do.
    """
    rest = dict(gen_kwargs)
    stops = _stops(rest.pop("until", None))
    length = _length(rest)
    asked = _temperature(rest) | _sampler_settings(rest, known)
    if isinstance(default, UniformNoiseSamplerConfig):
        asked.pop("temperature", None)  # it follows a schedule, and is never 0
        sampling = True
    else:
        sampling = (asked | dict(chosen)).get("temperature", default.temperature) > 0
    settings = asked | dict(chosen)
    _check_neutral(rest, known, sampling=sampling)
    _report_overruled(asked if length is None else {"gen_length": length} | asked, chosen)
    if length is None or "gen_length" in settings:
        return GenerationOptions(stops, None, tuple(sorted(settings.items())))
    settings |= _canvas(length, settings, default, known)
    return GenerationOptions(stops, length, tuple(sorted(settings.items())))


def cut_at_stops(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Cuts a text before the first stop in it.

    Returns:
        The text, and whether there was a stop.
    """
    found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return (text[: min(found)], True) if found else (text, False)


def _stops(until: Any) -> tuple[str, ...]:
    stops = [until] if isinstance(until, str) else list(until or ())
    for stop in stops:
        if not isinstance(stop, str):
            raise ValueError(f"until contains {stop!r}; valid: strings")
    return tuple(stop for stop in stops if stop)


def _length(rest: dict[str, Any]) -> int | None:
    """Takes the longest answer out of the arguments; the first of its names counts."""
    given = [(name, rest.pop(name)) for name in _LENGTH_NAMES if name in rest]
    for name, value in given:
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; valid: an integer of at least 1")
            return value
    return None


def _temperature(rest: dict[str, Any]) -> dict[str, Any]:
    """Takes `do_sample` and `temperature` out of the arguments."""
    do_sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
    if do_sample is False:
        return {"temperature": 0.0}
    return {} if temperature is None else {"temperature": float(temperature)}


def _sampler_settings(rest: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Takes the sampler's own settings out of the arguments, but for values that change nothing."""
    names = [name for name in rest if name in known and rest[name] not in _NEUTRAL.get(name, ())]
    return {name: rest.pop(name) for name in names}


def _canvas(
    length: int, settings: Mapping[str, Any], default: AnySamplerConfig, known: Collection[str]
) -> dict[str, int]:
    """The canvas that holds `length` tokens, and its steps if none are chosen."""
    if isinstance(default, BlockDiffusionSamplerConfig):  # any length will do, and steps are those of a block
        return {"gen_length": length}
    if isinstance(default, UniformNoiseSamplerConfig):  # whole canvases, and steps are those of a canvas
        size = settings.get("canvas_length", default.canvas_length)
        return {"gen_length": math.ceil(length / size) * size}
    has_blocks = "block_length" in known
    block_length = settings.get("block_length", default.block_length) if has_blocks else 1
    gen_length = math.ceil(length / block_length) * block_length
    if "steps" in settings:
        return {"gen_length": gen_length}
    blocks = gen_length // block_length if has_blocks else 1
    per_block = math.ceil(gen_length * default.steps / default.gen_length / blocks)
    return {"gen_length": gen_length, "steps": min(blocks * per_block, gen_length)}


def _report_overruled(asked: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    for name, value in asked.items():
        if name in chosen and value != chosen[name]:
            _LOGGER.warning("a task asks for %s %s; the run's %s counts", name, value, chosen[name])


def _check_neutral(rest: Mapping[str, Any], known: Collection[str], *, sampling: bool) -> None:
    for name, value in rest.items():
        if name not in _NEUTRAL:
            valid = ", ".join(sorted({"until", "do_sample", *_LENGTH_NAMES, *_NEUTRAL, *known}))
            raise ValueError(f"gen_kwargs: unknown {name!r}; valid: {valid}")
        if value not in _NEUTRAL[name] and (sampling or name not in _SAMPLING_ONLY):
            raise ValueError(
                f"gen_kwargs: {name} is {value!r}, which the sampler does not do; valid: {_NEUTRAL[name][-1]}, "
                f"as in --gen_kwargs {name}={_NEUTRAL[name][-1]}"
            )
