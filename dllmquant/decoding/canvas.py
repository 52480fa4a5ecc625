"""A batch while it is decoded: what a sampler shows the model, what it commits, and what is recorded of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dllmquant.decoding.recording import Recorder
from dllmquant.decoding.remasking import StepResult, forbid, guide
from dllmquant.decoding.trajectory import Trajectory

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``(ids int64 [B, L], attention_mask bool [B, L]) -> logits [B, L, V]``; ``logits[:, j]`` predicts position ``j``."""
CachedStep = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``(rows int64 [n], columns int64 [n, W], ids int64 [n, W], wanted) -> logits [n, wanted, V]`` of the last columns."""


@dataclass(frozen=True, eq=False)
class CachedDenoiser:
    """A block-causal model that keeps the keys and values of the columns it was shown.

    Attributes:
        open: ``attention_mask bool [B, L] -> step``: begins a batch, whose rows start at their first attended column. A
            step shows the model some columns of some rows, which may be given repeatedly. What the model keeps of a
            column is what it made of it last; its logits are right if every column of the same and of earlier blocks
            has been shown as it is now, in this step or before.
        shift: 0 if the logits at a column predict it, 1 if they predict the next one.
    """

    open: Callable[[Tensor], CachedStep]
    shift: Literal[0, 1] = 0


@dataclass(frozen=True, eq=False)
class Generation:
    """What the sampler produced, in prompt order, on the CPU.

    Attributes:
        tokens: int64 ``[N, gen_length]``, the generation regions; free of mask tokens, not cut at EOS.
        forward_passes: Calls of the denoiser, whatever their batch size; a guided step makes two.
        steps_used: int64 ``[N]``, the denoising steps of each prompt, all of which committed something: in blocks
            ``steps``, or with a threshold from the number of blocks to ``gen_length``; otherwise at most
            ``gen_length``, and along timesteps at most ``steps``.
        trajectory: Every state of every prompt, if recorded.
        lengths: int64 ``[N]``, the tokens up to and including the one that ended a generation, ``gen_length`` where
            none did; None from samplers that do not stop early.
    """

    tokens: Tensor
    forward_passes: int
    steps_used: Tensor
    trajectory: Trajectory | None
    lengths: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """What is the same for all batches of a run.

    Attributes:
        denoiser: The model.
        cached: The same model for single blocks; None if it keeps nothing, or the logits of whole canvases are needed.
        gen_length: Tokens to generate per prompt.
        mask_token_id: The mask token.
        pad_token_id: Fills left padding.
        forbidden: Tokens that are never generated, the mask token among them.
        deferred: Tokens that are committed last.
        ends: Tokens that end a generation, the first of them to fill what is left with; may be empty.
        device: Where the denoiser expects its inputs.
        record: Whether to keep every state.
        on_commit: Told how many tokens each step committed.
    """

    denoiser: Denoiser
    cached: CachedDenoiser | None
    gen_length: int
    mask_token_id: int
    pad_token_id: int
    forbidden: tuple[int, ...]
    deferred: tuple[int, ...]
    ends: tuple[int, ...]
    device: torch.device
    record: bool
    on_commit: Callable[[int], object]


@dataclass(frozen=True, eq=False)
class View:
    """The rows of a canvas that take part in a step, as they are before it.

    Attributes:
        rows: int64 ``[n]``.
        ids: int64 ``[n, L]``.
        attended: bool ``[n, L]``, False at left padding.
        mask: bool ``[n, L]``, True where ``ids`` holds the mask token.
    """

    rows: Tensor
    ids: Tensor
    attended: Tensor
    mask: Tensor


class Canvas:
    """The states of one batch of prompts, left-padded to one length ``L``.

    Attributes:
        job: What is the same for all batches.
        position: int64 ``[L]``, counted from the first generated token; negative in the prompt.
        window: The positions whose logits are of use: without a record, the generated ones.
        steps_used: int64 ``[B]``, the steps of each row so far.
    """

    def __init__(self, job: Job, rows: Sequence[Tensor], streams: Sequence[torch.Generator | None]) -> None:
        """Make the initial, fully masked states of prompts ``rows`` (int64 ``[l]`` each).

        Args:
            job: What is the same for all batches.
            rows: The prompts.
            streams: The random numbers of each prompt; None where the sampler draws none.
        """
        width = max(row.numel() for row in rows)
        ids = torch.full((len(rows), width + job.gen_length), job.pad_token_id, dtype=torch.int64)
        ids[:, width:] = job.mask_token_id
        attention = torch.zeros(ids.shape, dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, width - row.numel() : width] = row
            attention[index, width - row.numel() :] = True
        self.job = job
        self._ids, self._attention, self._streams = ids.to(job.device), attention.to(job.device), streams
        self.position = torch.arange(ids.shape[1], device=job.device) - width
        self.window = slice(0 if job.record else width, None)
        self.steps_used = torch.zeros(len(rows), dtype=torch.int64, device=job.device)
        self._forward_passes = 0
        self._lengths: Tensor | None = None
        self._step = None if job.cached is None else job.cached.open(self._attention)
        self._recorder = Recorder(ids.shape[1], [row.numel() for row in rows], job.gen_length, job.pad_token_id)

    @property
    def mask(self) -> Tensor:
        """Bool ``[B, L]``, True where the states still hold the mask token."""
        return self._ids == self.job.mask_token_id

    def view(self, chosen: Tensor) -> View:
        """The rows that take part in a step; ``chosen`` is bool ``[B]``."""
        rows = chosen.nonzero().squeeze(1)
        return View(rows, self._ids[rows], self._attention[rows], self.mask[rows])

    def uniform(self, rows: Tensor, counts: Tensor, *shape: int) -> Tensor:
        """Random numbers in [0, 1), float64 ``[sum of counts, *shape]``, ``counts[i]`` of them for ``rows[i]``."""
        return torch.cat(
            [
                torch.rand((count, *shape), generator=self._streams[row], dtype=torch.float64, device=self.job.device)
                for row, count in zip(rows.tolist(), counts.tolist(), strict=True)
            ]
        )

    def logits(self, view: View, cfg_scale: float = 0.0) -> Tensor:
        """Logits of the window's positions ``[n, W, V]``, guided if asked for, forbidden tokens removed.

        Raises:
            ValueError: If the denoiser returns another shape or dtype, or a special token is not in its vocabulary.
        """
        logits = self._run(view.ids, view.attended)[:, self.window]
        if cfg_scale > 0:
            without_prompt = view.ids.masked_fill(view.attended & (self.position < 0), self.job.mask_token_id)
            logits = guide(logits, self._run(without_prompt, view.attended)[:, self.window], cfg_scale)
        return self._permitted(logits)

    def cached_logits(self, view: View, columns: Tensor, wanted: int) -> Tensor:
        """Logits of the last ``wanted`` columns ``[n, wanted, V]``, forbidden tokens removed, of a job with a cache.

        Args:
            view: The rows.
            columns: int64 ``[n, W]``, what is shown to the model; with logits that predict the next column at least one
                more than ``wanted``.
            wanted: At least 1.

        Raises:
            ValueError: If the denoiser returns another shape or dtype, or a special token is not in its vocabulary.
        """
        assert self._step is not None
        assert self.job.cached is not None
        shift = self.job.cached.shift
        ids = view.ids.gather(1, columns)
        logits = self._checked(self._step(view.rows, columns, ids, wanted + shift), len(ids), wanted + shift)
        return self._permitted(logits[:, :wanted])

    def _permitted(self, logits: Tensor) -> Tensor:
        largest, vocabulary = max(self.job.forbidden + self.job.deferred), logits.shape[-1]
        if largest >= vocabulary:
            raise ValueError(
                f"mask_token_id, eos_token_id or eot_token_id is {largest}; "
                f"valid: 0 to {vocabulary - 1}, the vocabulary of the denoiser's logits"
            )
        return forbid(logits, self.job.forbidden)

    def _run(self, ids: Tensor, attention: Tensor) -> Tensor:
        return self._checked(self.job.denoiser(ids, attention), *ids.shape)

    def _checked(self, logits: Tensor, rows: int, columns: int) -> Tensor:
        if logits.dim() != 3 or logits.shape[:2] != (rows, columns) or not logits.dtype.is_floating_point:
            raise ValueError(
                f"logits of the denoiser have shape {tuple(logits.shape)} and dtype {logits.dtype}; "
                f"valid: a floating tensor [{rows}, {columns}, V]"
            )
        self._forward_passes += 1
        return logits

    def commit(self, view: View, result: StepResult, block: Tensor) -> None:
        """Write the outcome of a step, whose tensors cover the window, and record it.

        Args:
            view: The rows that took part.
            result: The outcome, ``[n, W]``.
            block: int64 ``[n]``, the block each row was decoding.

        Raises:
            ValueError: If a confidence at a real token is not finite.
        """
        if not bool(result.confidence[view.attended[:, self.window]].isfinite().all()):
            raise ValueError("logits of the denoiser give a confidence of NaN; valid: logits without NaN or +inf")
        if self.job.record:
            confidence = result.confidence.masked_fill(~view.attended, 0.0)
            ids, steps = view.ids.to(torch.int32), self.steps_used[view.rows]
            self._recorder.add(view.rows, steps, ids, view.mask, confidence, result.committed, block)
        self._ids[view.rows, self.window] = result.state
        self.steps_used[view.rows] += 1
        self.job.on_commit(int(result.committed.sum()))

    def end_rows(self) -> None:
        """End the rows that hold an ending token with everything before it committed: fill what they have not decoded.

        What is filled in is no step: nothing of it is recorded.
        """
        region = self._ids[:, -self.job.gen_length :]
        masked = region == self.job.mask_token_id
        ended = torch.isin(region, torch.tensor(self.job.ends, device=region.device)) & (masked.cumsum(dim=1) == 0)
        done = ended.any(dim=1)
        self._lengths = torch.where(done, ended.to(torch.int8).argmax(dim=1) + 1, self.job.gen_length)
        left = masked & done.unsqueeze(1)
        if bool(left.any()):
            region[left] = self.job.ends[0]
            self.job.on_commit(int(left.sum()))

    def generation(self) -> Generation:
        """What has been generated."""
        return Generation(
            tokens=self._ids[:, -self.job.gen_length :].cpu(),
            forward_passes=self._forward_passes,
            steps_used=self.steps_used.cpu(),
            trajectory=self._recorder.trajectory() if self.job.record else None,
            lengths=None if self._lengths is None else self._lengths.cpu(),
        )
