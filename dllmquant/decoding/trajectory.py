"""Recorded trajectories: every state a sampler passed through, as calibration consumes them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class State:
    """One denoising step of one prompt, as the model saw it.

    Invariants: all tensors are ``[L]`` on the CPU, laid out as left padding, prompt, generation region. ``mask`` lies
    inside the generation region, ``committed`` inside ``mask`` and inside block ``block``.

    Attributes:
        ids: int64, the state that was given to the model.
        attention_mask: bool, False at left padding.
        mask: bool, True where ``ids`` still holds the mask token.
        confidence: float32, the model's softmax probability of its candidate, 0 at padding.
        committed: bool, True where this step replaced the mask token: what turns this state into the next one.
        block: The index of the block being decoded, from 0.
        mask_ratio: The share of the generation region that is masked, in (0, 1].
    """

    ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    confidence: Tensor
    committed: Tensor
    block: int
    mask_ratio: float


@dataclass(frozen=True, eq=False)
class StateBatch:
    """Several states, left-padded to the longest of them.

    The attributes are those of :class:`State` with a leading batch dimension: ``ids`` int64, ``attention_mask``,
    ``mask`` and ``committed`` bool, ``confidence`` float32, all ``[n, L]``; ``block`` int64 and ``mask_ratio`` float32,
    both ``[n]``.
    """

    ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    confidence: Tensor
    committed: Tensor
    block: Tensor
    mask_ratio: Tensor

    def __len__(self) -> int:
        """The number of states."""
        return self.ids.shape[0]

    def to(self, device: torch.device | str) -> "StateBatch":
        """The same states with every tensor on ``device``."""
        return StateBatch(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The denoising steps of ``N`` prompts, padded to ``S`` steps and ``L`` positions, on the CPU.

    Positions are laid out as left padding, prompt, generation region (the last ``gen_length`` columns), so that the
    generation regions of all prompts share their columns. Step ``s`` of prompt ``i`` exists where ``valid[i, s]``;
    the existing steps of a prompt come first. Elsewhere ``ids`` is ``pad_token_id``, ``block`` is -1, and the other
    tensors are 0 or False.

    Invariants for existing steps: state ``s + 1`` equals state ``s`` except where ``committed[i, s]``; ``committed``
    implies ``mask``; ``mask`` implies the generation region. The first does not hold for runs from uniform noise
    (:mod:`dllmquant.decoding.uniform_noise`): there ``mask`` says which positions hold noise instead of the mask token,
    ``committed`` which of them a step accepted, and a step changes other positions of the generation region too. Each
    canvas of such a run is a prompt of its own here, which begins with all canvases before it.

    Attributes:
        ids: int32 ``[N, S, L]``, the states given to the model.
        mask: bool ``[N, S, L]``, True where the state still holds the mask token.
        confidence: float32 ``[N, S, L]``, the model's softmax probability of its candidate; 0 at padding.
        committed: bool ``[N, S, L]``, True where the step replaced a mask token.
        block: int64 ``[N, S]``, the block being decoded, from 0; it never decreases.
        valid: bool ``[N, S]``.
        prompt_lengths: int64 ``[N]``.
        gen_length: The length of the generation region.
        pad_token_id: The token at left padding.

    Raises:
        ValueError: On construction, if a tensor's shape or dtype is not as above, ``gen_length`` is not in 1..``L``,
            a prompt length is not in 0..``L - gen_length``, or the existing steps of a prompt do not come first.
    """

    ids: Tensor
    mask: Tensor
    confidence: Tensor
    committed: Tensor
    block: Tensor
    valid: Tensor
    prompt_lengths: Tensor
    gen_length: int
    pad_token_id: int

    def __post_init__(self) -> None:
        """Check shapes, dtypes and lengths."""
        if self.ids.dim() != 3:
            raise ValueError(f"ids has shape {tuple(self.ids.shape)}; valid: three dimensions [N, S, L]")
        cube, table = tuple(self.ids.shape), tuple(self.ids.shape[:2])
        for name, shape, dtype in (
            ("ids", cube, torch.int32),
            ("mask", cube, torch.bool),
            ("confidence", cube, torch.float32),
            ("committed", cube, torch.bool),
            ("block", table, torch.int64),
            ("valid", table, torch.bool),
            ("prompt_lengths", cube[:1], torch.int64),
        ):
            value: Tensor = getattr(self, name)
            if tuple(value.shape) != shape or value.dtype != dtype:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; valid: shape {shape} and {dtype}"
                )
        length = cube[2]
        if not 1 <= self.gen_length <= length:
            raise ValueError(f"gen_length is {self.gen_length}; valid: 1 to {length}, the length of the states")
        longest = length - self.gen_length
        if bool(((self.prompt_lengths < 0) | (self.prompt_lengths > longest)).any()):
            raise ValueError(f"prompt_lengths is {self.prompt_lengths.tolist()}; valid: lengths from 0 to {longest}")
        if bool((self.valid[:, 1:] & ~self.valid[:, :-1]).any()):
            raise ValueError("valid has a step after a missing one; valid: the existing steps of a prompt come first")

    def __len__(self) -> int:
        """The number of recorded steps (states), over all prompts."""
        return int(self.valid.sum())

    @property
    def num_prompts(self) -> int:
        """``N``."""
        return self.ids.shape[0]

    @property
    def num_steps(self) -> Tensor:
        """``[N]`` int64, the number of recorded steps of each prompt."""
        return self.valid.sum(dim=1)

    @property
    def mask_ratio(self) -> Tensor:
        """``[N, S]`` float32, the masked share of the generation region before each step; 0 where not valid."""
        return self.mask.sum(dim=-1).to(torch.float32) / self.gen_length

    @property
    def attention_mask(self) -> Tensor:
        """``[N, L]`` bool, False at left padding; the same at every step."""
        length = self.ids.shape[2]
        starts = length - self.gen_length - self.prompt_lengths
        return torch.arange(length) >= starts.unsqueeze(1)

    def state(self, prompt: int, step: int) -> State:
        """One state, padded to the ``L`` of this trajectory.

        Args:
            prompt: In ``0..N - 1``.
            step: In ``0..num_steps[prompt] - 1``.

        Raises:
            IndexError: If there is no such step.
        """
        batch = self._gather([(prompt, step)])
        return State(
            ids=batch.ids[0],
            attention_mask=batch.attention_mask[0],
            mask=batch.mask[0],
            confidence=batch.confidence[0],
            committed=batch.committed[0],
            block=int(batch.block[0]),
            mask_ratio=float(batch.mask_ratio[0]),
        )

    def states(self, indices: Sequence[tuple[int, int]]) -> StateBatch:
        """Chosen states, with left padding trimmed to the longest prompt among them.

        Args:
            indices: Pairs (prompt, step) in any order; a pair may be repeated.

        Raises:
            IndexError: If a pair names no recorded step.
            ValueError: If ``indices`` is empty.
        """
        if not indices:
            raise ValueError("indices is empty; valid: at least one (prompt, step)")
        batch = self._gather(indices)
        start = int(batch.attention_mask.to(torch.int8).argmax(dim=1).min())
        return StateBatch(
            ids=batch.ids[:, start:],
            attention_mask=batch.attention_mask[:, start:],
            mask=batch.mask[:, start:],
            confidence=batch.confidence[:, start:],
            committed=batch.committed[:, start:],
            block=batch.block,
            mask_ratio=batch.mask_ratio,
        )

    @classmethod
    def merge(cls, parts: Sequence["Trajectory"]) -> "Trajectory":
        """Concatenate the prompts of several trajectories, padding positions on the left and steps at the end.

        Args:
            parts: Trajectories with the same ``gen_length`` and ``pad_token_id``; at least one.

        Raises:
            ValueError: If ``parts`` is empty or the parts disagree.
        """
        if not parts:
            raise ValueError("parts is empty; valid: at least one trajectory")
        for name in ("gen_length", "pad_token_id"):
            values = sorted({getattr(part, name) for part in parts})
            if len(values) > 1:
                raise ValueError(f"{name} is {values} across the parts; valid: the same in every part")
        steps = max(part.ids.shape[1] for part in parts)
        length = max(part.ids.shape[2] for part in parts)

        def joined(name: str, fill: int = 0) -> Tensor:
            return torch.cat([_padded(getattr(part, name), steps, length, fill) for part in parts])

        return cls(
            ids=joined("ids", parts[0].pad_token_id),
            mask=joined("mask"),
            confidence=joined("confidence"),
            committed=joined("committed"),
            block=joined("block", -1),
            valid=joined("valid"),
            prompt_lengths=torch.cat([part.prompt_lengths for part in parts]),
            gen_length=parts[0].gen_length,
            pad_token_id=parts[0].pad_token_id,
        )

    def _gather(self, indices: Sequence[tuple[int, int]]) -> StateBatch:
        steps = self.num_steps.tolist()
        for prompt, step in indices:
            if not 0 <= prompt < len(steps):
                raise IndexError(f"prompt is {prompt}; valid: 0 to {len(steps) - 1}")
            if not 0 <= step < steps[prompt]:
                raise IndexError(f"step is {step}; valid for prompt {prompt}: 0 to {steps[prompt] - 1}")
        rows, columns = torch.tensor(list(indices), dtype=torch.int64).unbind(dim=1)
        mask = self.mask[rows, columns]
        return StateBatch(
            ids=self.ids[rows, columns].to(torch.int64),
            attention_mask=self.attention_mask[rows],
            mask=mask,
            confidence=self.confidence[rows, columns],
            committed=self.committed[rows, columns],
            block=self.block[rows, columns],
            mask_ratio=mask.sum(dim=-1).to(torch.float32) / self.gen_length,
        )


def _padded(value: Tensor, steps: int, length: int, fill: int) -> Tensor:
    """Pad ``[n, s]`` to ``[n, steps]``, or ``[n, s, l]`` to ``[n, steps, length]`` (positions on the left)."""
    missing = (0, steps - value.shape[1])
    amounts = missing if value.dim() == 2 else (length - value.shape[2], 0, *missing)
    return pad(value, amounts, value=fill)
