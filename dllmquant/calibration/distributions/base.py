"""What every distribution of calibration states is asked for, and what it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.calibration.prompts import Prompt
from dllmquant.core.coverage import Coverage
from dllmquant.decoding import StateBatch

_COUNTS = ("prompts", "forward_passes", "sequences", "tokens")


@dataclass(frozen=True)
class Request:
    """How states are to be made; a distribution reads the fields that mean something to it.

    Attributes:
        num_states: States to make.
        batch_size: Sequences per forward pass.
        seed: Seed of decoding, masks and selection.
        progress: Whether to show progress bars.
        quotas: Share of the states from each equal segment of the trajectory, first to last.
        mask_ratio_buckets: Equal intervals of the mask ratio that coverage is counted in.
        visible_prefix: Share of a sequence that "mcs" never masks.
        sampler: Sampler settings that replace the checkpoint's own while recording.
        cache: Directory of recorded trajectories; None records anew and stores nothing.
    """

    num_states: int
    batch_size: int = 32
    seed: int = 0
    progress: bool = False
    quotas: tuple[float, ...] = (0.3, 0.2, 0.2, 0.3)
    mask_ratio_buckets: int = 4
    visible_prefix: float = 0.25
    sampler: Mapping[str, Any] = field(default_factory=dict)
    cache: Path | None = None


@dataclass(frozen=True)
class Cost:
    """What it takes to make calibration states.

    Attributes:
        prompts: Prompts that are used.
        forward_passes: Calls of the model, each on a batch. Where a recorded trajectory was reused, these and what
            follows are those of its recording.
        sequences: Sequences in these batches: a prompt that is decoded counts at every step, twice with guidance.
        tokens: Tokens of these sequences, padding not.
        seconds: Wall time in this process; None if it is not known, as from a checkpoint.
        cached: Whether a recorded trajectory was reused, so that the model was not called in this process.
    """

    prompts: int
    forward_passes: int
    sequences: int
    tokens: int
    seconds: float | None = None
    cached: bool = False

    def __add__(self, other: "Cost") -> "Cost":
        """The cost of both; the time where both are known."""
        counts = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        known = self.seconds is not None and other.seconds is not None
        seconds = (self.seconds or 0.0) + (other.seconds or 0.0) if known else None
        return replace(self, **counts, seconds=seconds, cached=self.cached and other.cached)

    @property
    def prompts_per_second(self) -> float:
        """Prompts over wall time; 0 when no time was measured."""
        return self.prompts / self.seconds if self.seconds else 0.0

    def summary(self) -> str:
        """Returns the cost in one sentence."""
        counts = ", ".join(f"{getattr(self, name):,} {name.replace('_', ' ')}" for name in _COUNTS)
        if self.seconds is None:
            return counts
        if self.cached:
            return f"{counts}; read from the cache in {self.seconds:.1f} s"
        return f"{counts}; {self.seconds:.1f} s ({self.prompts_per_second:.1f} prompts/s)"

    def counts(self) -> dict[str, int]:
        """Returns what the same recipe, seed and prompts repeat, whether or not there is a cache."""
        return {name: getattr(self, name) for name in _COUNTS}

    @classmethod
    def from_counts(cls, document: Any) -> "Cost":
        """Restores what `counts` returned.

        Raises:
            ValueError: A count is missing, unknown, or not an integer of at least 0.
        """
        if not isinstance(document, Mapping) or set(document) != set(_COUNTS):
            raise ValueError(f"cost: {document!r}; valid: a mapping of {', '.join(_COUNTS)}")
        for name, count in document.items():
            if type(count) is not int or count < 0:
                raise ValueError(f"cost: {name}: {count!r}; valid: an integer of at least 0")
        return cls(**document)

    def to_dict(self) -> dict[str, int | float | bool | None]:
        """Returns JSON-compatible values."""
        return {**self.counts(), "seconds": self.seconds, "cached": self.cached}


@dataclass(frozen=True, eq=False)
class Drawn:
    """States of one distribution.

    Attributes:
        batch: The states, on the CPU.
        coverage: Where in the denoising process they lie.
        cost: What they took.
        notes: What a reader of the report should know; empty when everything is as asked for.
        tail: bool [states, length], the positions behind the end of the generated text, which hold nothing but its
            padding; None where texts have no such positions.
        waiting: bool [states, length], masked positions of blocks that are decoded later; None where states have no
            blocks.
    """

    batch: StateBatch
    coverage: Coverage
    cost: Cost
    notes: tuple[str, ...] = ()
    tail: Tensor | None = None
    waiting: Tensor | None = None


class DrawStates(Protocol):
    """A distribution of calibration states as a function; it leaves the model as it was."""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        request: Request,
        /,
    ) -> Drawn:
        """Makes `request.num_states` states; ValueError where that cannot be done."""
        ...


@dataclass(frozen=True)
class Distribution:
    """A row of the registry.

    Attributes:
        draw: Makes the states.
        prompt_per_state: Whether every state takes a prompt of its own; otherwise the recipe says how many prompts are
            decoded, each of which yields many states.
    """

    draw: DrawStates
    prompt_per_state: bool


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token at left padding: the padding token, or else the end of text, as decoding has it.

    Raises:
        ValueError: The tokenizer has neither.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None:
        raise ValueError("tokenizer: it has neither a padding nor an EOS token; set one")
    return int(pad)


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Returns ids, int64, and attention mask, bool, both [rows, longest]."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad)
    keep = torch.zeros(ids.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = torch.tensor(row)
        keep[index, length - len(row) :] = True
    return ids, keep
