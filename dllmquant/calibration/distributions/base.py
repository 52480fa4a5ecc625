"""What every distribution of calibration states is asked for, and what it returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.calibration.prompts import Prompt
from dllmquant.core.coverage import Coverage
from dllmquant.decoding import StateBatch


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
    """What it took to make calibration states.

    Attributes:
        prompts: Prompts that were used.
        forward_passes: Calls of the model, whatever their batch size; 0 when a recorded trajectory was reused.
        seconds: Wall time.
        cached: Whether a recorded trajectory was reused.
    """

    prompts: int
    forward_passes: int
    seconds: float
    cached: bool = False

    @property
    def prompts_per_second(self) -> float:
        """Prompts over wall time; 0 when no time was measured."""
        return self.prompts / self.seconds if self.seconds > 0 else 0.0

    def summary(self) -> str:
        """Returns the cost in one sentence."""
        made = f"{self.forward_passes} forward passes" + (", trajectories from the cache" if self.cached else "")
        return f"{self.prompts} prompts, {made}, {self.seconds:.1f} s ({self.prompts_per_second:.1f} prompts/s)"

    def to_dict(self) -> dict[str, int | float | bool]:
        """Returns JSON-compatible values."""
        return {
            "prompts": self.prompts,
            "forward_passes": self.forward_passes,
            "seconds": self.seconds,
            "cached": self.cached,
        }


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
    """

    batch: StateBatch
    coverage: Coverage
    cost: Cost
    notes: tuple[str, ...] = ()
    tail: Tensor | None = None


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
