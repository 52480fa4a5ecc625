"""Settings of published evaluation protocols, by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """How a published study measured a family of tasks; by default, settings that change nothing.

    How many solved examples stand before a problem is lm-eval's option, which a model does not see; the documentation
    lists the studies' numbers.

    Attributes:
        source: The study.
        tasks: What it measured this way, by the names of lm-eval's tasks.
        sampler: Fields of `SamplerConfig` for tasks that generate; empty for tasks scored by likelihood.
        mc_num: Masks drawn per target for tasks scored by likelihood; not used by tasks that generate.
    """

    source: str = ""
    tasks: tuple[str, ...] = ()
    sampler: Mapping[str, Any] = field(default_factory=dict)
    mc_num: int = 128


_QDLM = "QDLM, arXiv 2508.14896, for LLaDA"


def _decoding(gen_length: int, block_length: int) -> dict[str, Any]:
    """One token per step, the most confident first, without guidance."""
    return {
        "gen_length": gen_length,
        "steps": gen_length,
        "block_length": block_length,
        "temperature": 0.0,
        "cfg_scale": 0.0,
        "remasking": "low_confidence",
    }


PRESETS: Mapping[str, Preset] = {
    "qdlm-qa": Preset(_QDLM, ("hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge")),
    "qdlm-mmlu": Preset(_QDLM, ("mmlu",), mc_num=1),
    "qdlm-gsm8k": Preset(_QDLM, ("gsm8k",), _decoding(256, 32)),
    "qdlm-math": Preset(_QDLM, ("minerva_math",), _decoding(256, 64)),
    "qdlm-humaneval": Preset(_QDLM, ("humaneval",), _decoding(512, 32)),
    "qdlm-mbpp": Preset(_QDLM, ("mbpp",), _decoding(512, 32)),
}


def find_preset(name: str) -> Preset:
    """Returns a preset.

    Args:
        name: Such as "qdlm-gsm8k".

    Raises:
        ValueError: There is no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: unknown {name!r}; valid: {', '.join(PRESETS)}")
    return PRESETS[name]
