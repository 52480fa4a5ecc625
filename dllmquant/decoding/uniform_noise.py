"""Decoding canvas by canvas from uniform noise: DiffusionGemma's sampler, as transformers' ``generate`` has it.

A canvas starts as random tokens. At every step the model predicts all of its tokens, given what it predicted at the
step before (self-conditioning); a token is drawn for every position from the prediction at the step's temperature; the
surest positions are accepted and the others get new random tokens. Positions that were accepted before compete again:
nothing is final until the canvas is, which then holds the model's likeliest tokens. A canvas is finished when these no
longer change and their mean entropy is low, or after ``steps`` steps. Finished canvases are context of the next one.

There is no mask token. A position counts as masked while it holds noise: before the first step, and whenever the step
before did not accept it. Its candidate is the token drawn for it, its confidence the probability of that token under
the prediction without temperature.

Deviations from transformers' code, besides those that all samplers share (:mod:`dllmquant.decoding.sampler`; the first
of them has no meaning here):

1. A prompt leaves the batch as soon as its canvas is finished, and for good when a canvas holds an ending token; there
   the others wait. Its tokens behind the canvas are padding; those behind the ending token, in the canvas, stay.
2. Tokens are drawn by inverting the distribution function in float64, from one random number per position, where the
   published code calls ``torch.multinomial``.
3. Keys and values are not kept: every step runs the model on context and canvas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dllmquant.decoding.canvas import Generation
from dllmquant.decoding.config import UniformNoiseSamplerConfig
from dllmquant.decoding.prompts import check_token_ids, token_rows
from dllmquant.decoding.ranking import draw_tokens
from dllmquant.decoding.recording import Recorder
from dllmquant.decoding.remasking import probability, widen
from dllmquant.decoding.sampler import random_streams
from dllmquant.decoding.trajectory import Trajectory

Refiner = Callable[[Tensor, Tensor, Tensor | None, slice], Tensor]
"""``(ids int64 [B, L], attention_mask bool [B, L], previous, window) -> logits [B, window, V]``.

``previous`` holds the logits of the canvas at the step before, ``[B, canvas_length, V]``, or is None at the first one;
``window`` says which columns' logits are wanted.
"""


@torch.no_grad()
def sample_canvases(
    refiner: Refiner,
    prompts: Sequence[Sequence[int] | Tensor],
    config: UniformNoiseSamplerConfig,
    *,
    vocab_size: int,
    pad_token_id: int,
    eos_token_id: int | None = None,
    eot_token_id: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    record: bool = False,
    progress: bool = False,
) -> Generation:
    """Generate a continuation of every prompt.

    The result does not depend on ``batch_size`` as long as the model computes each row independently of the others and
    of left padding (to the rounding of its own arithmetic).

    Args:
        refiner: The model. Called without gradients; its output is not changed in place.
        prompts: Token ids, one sequence or one-dimensional integer tensor per prompt; a prompt may be empty.
        config: How to decode.
        vocab_size: Noise is drawn from tokens below this.
        pad_token_id: Fills left padding, and what follows a canvas with an ending token.
        eos_token_id: Ends a generation with the canvas it is in.
        eot_token_id: Likewise.
        generator: Source of the seeds of the prompts' random streams; torch's global generator if not given.
        device: Where the model expects its inputs; the CPU if not given.
        batch_size: Prompts decoded together, at least 1.
        record: Whether to keep every state: a trajectory with a row for every canvas of every prompt, in this order,
            whose prompt is all that precedes the canvas. Confidences are then computed for these too.
        progress: Whether to show a progress bar that counts generated tokens.

    Returns:
        The generated tokens, with the trajectory if ``record``.

    Raises:
        ValueError: If a prompt or a token id is not as above, or the model returns logits of the wrong shape or dtype,
            or logits that give no finite entropy (NaN).
    """
    device = torch.device("cpu" if device is None else device)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; valid: an integer of at least 1")
    check_token_ids(None, pad_token_id, eos_token_id, eot_token_id)
    rows = token_rows(prompts, None)
    ends = torch.tensor([token for token in (eos_token_id, eot_token_id) if token is not None], dtype=torch.int64)
    job = _Job(refiner, config, vocab_size, pad_token_id, ends, device, record)
    works = [_Work(row, stream) for row, stream in zip(rows, random_streams(len(rows), generator, device), strict=True)]
    order = sorted(works, key=lambda work: work.ids.numel())  # prompts of like lengths need little padding
    passes = 0
    with tqdm(total=len(rows) * config.gen_length, unit="token", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            for _ in range(config.gen_length // config.canvas_length):
                batch = [work for work in order[start : start + batch_size] if work.length is None]
                if not batch:
                    break
                canvas = _Canvas(job, batch)
                for step in range(config.steps):
                    if canvas.rows.numel():
                        canvas.step(step)
                if record:
                    canvas.keep_record()
                passes += canvas.passes
                bar.update(len(batch) * config.canvas_length)
    parts = [part for work in works for part in work.parts]
    return Generation(
        tokens=torch.stack([work.generated(config.gen_length, pad_token_id) for work in works]),
        forward_passes=passes,
        steps_used=torch.tensor([work.steps for work in works]),
        trajectory=Trajectory.merge(parts) if record else None,
        lengths=torch.tensor([config.gen_length if work.length is None else work.length for work in works]),
    )


def temperature(config: UniformNoiseSamplerConfig, step: int) -> float:
    """The temperature of a step, counted from 0."""
    return config.t_min + (config.t_max - config.t_min) * (config.steps - step) / config.steps


def accept(entropy: Tensor, bound: float) -> Tensor:
    """Which positions a step accepts: the surest ones, whose entropies without the largest sum to at most a bound.

    That sum bounds the mutual information of their tokens, so that those accepted together are nearly independent
    (Ben-Hamu et al., arXiv 2505.24857). Equal entropies count in the order of their positions. At least one position is
    accepted.

    Args:
        entropy: ``[B, canvas_length]``, at least 0.
        bound: At least 0.

    Returns:
        bool ``[B, canvas_length]``.
    """
    ordered, place = entropy.sort(dim=-1, stable=True)
    return torch.zeros_like(place, dtype=torch.bool).scatter(-1, place, ordered.cumsum(dim=-1) - ordered <= bound)


@dataclass(frozen=True, eq=False)
class _Job:
    """What is the same for all batches of a run."""

    refiner: Refiner
    config: UniformNoiseSamplerConfig
    vocab_size: int
    pad_token_id: int
    ends: Tensor
    device: torch.device
    record: bool


@dataclass(eq=False)
class _Work:
    """A prompt with what has been generated so far.

    Attributes:
        ids: int64 ``[l]``, on the CPU: the prompt, then finished canvases.
        stream: Its random numbers.
        canvases: Those that are finished.
        steps: Denoising steps so far.
        length: Tokens up to and including the ending one; None until there is one.
        parts: What was recorded of each canvas.
    """

    ids: Tensor
    stream: torch.Generator
    canvases: list[Tensor] = field(default_factory=list)
    steps: int = 0
    length: int | None = None
    parts: list[Trajectory] = field(default_factory=list)

    def finish(self, canvas: Tensor, steps: int, ends: Tensor) -> None:
        """Appends a finished canvas ``[canvas_length]``."""
        is_end = torch.isin(canvas, ends)
        if bool(is_end.any()):
            self.length = len(self.canvases) * len(canvas) + int(is_end.to(torch.int8).argmax()) + 1
        self.ids = torch.cat((self.ids, canvas))
        self.canvases.append(canvas)
        self.steps += steps

    def generated(self, gen_length: int, pad_token_id: int) -> Tensor:
        """The generation region, int64 ``[gen_length]``."""
        tokens = torch.cat(self.canvases)
        return torch.cat((tokens, tokens.new_full((gen_length - len(tokens),), pad_token_id)))


class _Canvas:
    """The next canvas of some prompts while it is decoded; prompts are left-padded to one length.

    Attributes:
        passes: Calls of the model so far.
        rows: int64 ``[n]``, those that are not finished. What follows belongs to these.
        masked: bool ``[n, canvas_length]``, True where the canvas holds noise.
        previous: float ``[n, canvas_length, V]``, the prediction of the step before at its temperature.
        likeliest: int64 ``[stability_threshold, n, canvas_length]``, the likeliest tokens of the last steps.
    """

    def __init__(self, job: _Job, works: Sequence[_Work]) -> None:
        size, device = job.config.canvas_length, job.device
        lengths = [work.ids.numel() for work in works]
        self._job, self._works, self._width = job, works, max(lengths)
        ids = torch.full((len(works), self._width + size), job.pad_token_id)
        for row, work in zip(ids, works, strict=True):
            row[self._width - work.ids.numel() : self._width] = work.ids
        starts = self._width - torch.tensor(lengths)
        self._attended = (torch.arange(ids.shape[1]) >= starts[:, None]).to(device)
        self._ids = ids.to(device)
        self._ids[:, self._width :] = _noise(job, works)
        self._confidence = torch.zeros(ids.shape, device=device)
        self._recorder = Recorder(ids.shape[1], lengths, size, job.pad_token_id)
        self.passes = 0
        self.rows = torch.arange(len(works), device=device)
        self.masked = torch.ones(len(works), size, dtype=torch.bool, device=device)
        self.previous: Tensor | None = None
        self.likeliest = torch.full((job.config.stability_threshold, len(works), size), -1, device=device)

    def step(self, number: int) -> None:
        """Makes a step, counted from 0; rows that it finishes leave."""
        config = self._job.config
        works = [self._works[row] for row in self.rows.tolist()]
        logits = self._logits(number)
        scaled = logits / temperature(config, number)
        pairs = [_drawn(own, work.stream) for own, work in zip(scaled, works, strict=True)]
        drawn, entropy = (torch.stack(each) for each in zip(*pairs, strict=True))
        if not bool(entropy.isfinite().all()):
            raise ValueError("logits of the model give an entropy of NaN; valid: logits without NaN or +inf")
        accepted = accept(entropy, config.entropy_bound)
        if self._job.record:
            self._record(number, accepted, probability(logits, drawn))
        self._ids[self.rows, self._width :] = torch.where(accepted, drawn, _noise(self._job, works))
        best = scaled.argmax(dim=-1)
        stable = (self.likeliest == best).all(dim=-1).all(dim=0)
        done = stable & (entropy.mean(dim=-1) < config.confidence_threshold) | (number == config.steps - 1)
        self.likeliest = torch.cat((self.likeliest, best[None]))[1:, ~done]
        self.masked, self.previous = ~accepted[~done], scaled[~done]
        for row, canvas in zip(self.rows[done].tolist(), best[done].cpu(), strict=True):
            self._works[row].finish(canvas, number + 1, self._job.ends)
        self.rows = self.rows[~done]

    def keep_record(self) -> None:
        """Gives every prompt what was recorded of its canvas."""
        recorded = self._recorder.trajectory()
        for index, work in enumerate(self._works):
            work.parts.append(_row(recorded, index))

    def _logits(self, number: int) -> Tensor:
        """Predictions of the canvas, float32 or wider ``[n, canvas_length, V]``."""
        width = self._width
        window = slice(0 if self._job.record and number == 0 else width, None)
        logits = self._job.refiner(self._ids[self.rows], self._attended[self.rows], self.previous, window)
        shape = (len(self.rows), self._ids.shape[1] - window.start)
        if logits.dim() != 3 or logits.shape[:2] != shape or not logits.dtype.is_floating_point:
            raise ValueError(
                f"logits of the model have shape {tuple(logits.shape)} and dtype {logits.dtype}; "
                f"valid: a floating tensor [{shape[0]}, {shape[1]}, V]"
            )
        self.passes += 1
        if window.start < width:
            self._confidence[:, :width] = widen(logits[:, :width]).softmax(dim=-1).amax(dim=-1)
        return widen(logits[:, width - window.start :])

    def _record(self, number: int, accepted: Tensor, confidence: Tensor) -> None:
        """Records the states before a step, and what it does to them."""
        rows = self.rows
        mask = torch.zeros(len(rows), self._ids.shape[1], dtype=torch.bool, device=rows.device)
        mask[:, self._width :] = self.masked
        committed = mask.clone()
        committed[:, self._width :] &= accepted
        self._confidence[rows, self._width :] = confidence.to(self._confidence.dtype)
        shown = self._confidence[rows].masked_fill(~self._attended[rows], 0.0)
        ids, step, block = self._ids[rows].to(torch.int32), torch.full_like(rows, number), torch.zeros_like(rows)
        self._recorder.add(rows, step, ids, mask, shown, committed, block)


def _drawn(logits: Tensor, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws a token for every position of one canvas: int64 ``[canvas_length]``, and the entropies it is drawn with.

    One canvas at a time: probabilities of a large vocabulary take as much memory as all else.
    """
    probabilities = logits.softmax(dim=-1)
    uniform = torch.rand(len(logits), generator=stream, dtype=torch.float64, device=logits.device)
    return draw_tokens(probabilities, uniform), torch.special.entr(probabilities).sum(dim=-1)


def _noise(job: _Job, works: Sequence[_Work]) -> Tensor:
    """Random tokens for a canvas of each prompt, int64 ``[n, canvas_length]``."""
    size = (job.config.canvas_length,)
    return torch.stack(
        [torch.randint(job.vocab_size, size, generator=work.stream, device=job.device) for work in works]
    )


def _row(trajectory: Trajectory, index: int) -> Trajectory:
    """One row of a trajectory."""
    values: dict[str, Any] = {each.name: getattr(trajectory, each.name) for each in fields(trajectory)}
    rows: dict[str, Any] = {
        name: value[index : index + 1] for name, value in values.items() if isinstance(value, Tensor)
    }
    return replace(trajectory, **rows)
