"""Semi-autoregressive block decoding of masked diffusion language models.

The generation region starts as mask tokens and is decoded block by block from left to right. Within a block, every
denoising step runs the model on the whole sequence and commits some of the block's masked positions: a fixed number of
the most confident (or random) ones as in LLaDA (arXiv 2502.09992), or all that reach a confidence threshold as in
Fast-dLLM (arXiv 2505.22618).

Deviations from LLaDA's published sampler, besides those of :mod:`dllmquant.decoding.remasking`:

1. The mask token is never a candidate: its logit is set to ``-inf`` after guidance, so it has no share in any
   confidence either. The published code can "commit" a mask token, which wastes the step and leaves a hole.
2. Prompts of different lengths are left-padded and the padding is hidden by the attention mask. Models with relative
   positions (RoPE) see exactly what they would see without padding.
3. Guidance runs the unconditional pass as a second call of the denoiser rather than in a doubled batch, and leaves
   padding tokens as they are (they are hidden from both passes).
4. Random numbers come from one stream per prompt, seeded in prompt order from the given generator, so that the batch
   size does not change them.
5. Under threshold decoding every prompt moves to its next block as soon as its own block is complete, and leaves the
   batch as soon as it is finished; it does not wait for the slowest prompt of the batch.
6. ``steps`` above ``gen_length`` is an error: some of the steps would commit nothing.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dllmquant.decoding.remasking import (
    Candidates,
    StepResult,
    commit_above_threshold,
    commit_most_confident,
    forbid,
    guide,
    propose,
)
from dllmquant.decoding.schedule import transfer_counts
from dllmquant.decoding.trajectory import Trajectory

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``(ids int64 [B, L], attention_mask bool [B, L]) -> logits [B, L, V]``; ``logits[:, j]`` predicts position ``j``."""


@dataclass(frozen=True)
class SamplerConfig:
    """How to decode; the defaults are LLaDA's.

    Attributes:
        steps: Denoising steps of the whole generation, spread evenly over the blocks: a multiple of the number of
            blocks, from the number of blocks to ``gen_length``. Not used if ``threshold`` is given; only at least 1
            is then required.
        gen_length: Tokens to generate per prompt; a multiple of ``block_length``.
        block_length: Tokens per block.
        temperature: 0 commits the argmax; above 0, candidates are drawn from ``softmax(logits / temperature)``.
        cfg_scale: Scale of unsupervised classifier-free guidance; 0 is off, otherwise every step costs two forward
            passes.
        remasking: Which candidates to commit: those of the highest confidence, or random ones.
        threshold: If given, a probability in (0, 1]: a step commits every candidate of the block that is at least this
            confident, and at least one.
        logits_eos_inf: Never generate the EOS token.
        confidence_eos_eot_inf: Commit EOS and EoT candidates last.

    Raises:
        ValueError: On construction, naming the field, its value and what is valid.
    """

    steps: int = 128
    gen_length: int = 128
    block_length: int = 128
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    threshold: float | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    def __post_init__(self) -> None:
        """Check every field, then the combinations."""
        self._check_ranges()
        self._check_lengths()
        self._check_remasking()

    @property
    def num_blocks(self) -> int:
        """The number of blocks of the generation region."""
        return self.gen_length // self.block_length

    @property
    def stochastic(self) -> bool:
        """Whether decoding draws random numbers."""
        return self.temperature > 0 or self.remasking == "random"

    def _check_ranges(self) -> None:
        for name in ("steps", "gen_length", "block_length"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name} is {count!r}; valid: an integer of at least 1")
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            if not _is_number(value) or not 0.0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}; valid: a finite number of at least 0")
        for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
            flag = getattr(self, name)
            if not isinstance(flag, bool):
                raise ValueError(f"{name} is {flag!r}; valid: True or False")

    def _check_lengths(self) -> None:
        if self.gen_length % self.block_length:
            raise ValueError(f"gen_length is {self.gen_length}; valid: a multiple of block_length {self.block_length}")
        if self.threshold is not None:
            return
        if self.steps % self.num_blocks or self.steps > self.gen_length:
            raise ValueError(
                f"steps is {self.steps}; valid: a multiple of the number of blocks "
                f"({self.num_blocks} = gen_length {self.gen_length} / block_length {self.block_length}), "
                f"at most gen_length {self.gen_length}"
            )

    def _check_remasking(self) -> None:
        if self.remasking not in ("low_confidence", "random"):
            raise ValueError(f"remasking is {self.remasking!r}; valid: 'low_confidence' or 'random'")
        if self.threshold is not None and (not _is_number(self.threshold) or not 0.0 < self.threshold <= 1.0):
            raise ValueError(f"threshold is {self.threshold!r}; valid: None or a probability in (0, 1]")
        if self.remasking == "random":
            if self.threshold is not None:
                raise ValueError(
                    f"threshold is {self.threshold} with remasking 'random'; "
                    "valid: None, or remasking 'low_confidence': random scores cannot be compared with a confidence"
                )
            if self.confidence_eos_eot_inf:
                raise ValueError(
                    "confidence_eos_eot_inf is True with remasking 'random'; "
                    "valid: False, or remasking 'low_confidence': a random order has no confidence to change"
                )


@dataclass(frozen=True, eq=False)
class Generation:
    """What the sampler produced, in prompt order, on the CPU.

    Attributes:
        tokens: int64 ``[N, gen_length]``, the generation regions; free of mask tokens, not cut at EOS.
        forward_passes: Calls of the denoiser, whatever their batch size; a guided step makes two.
        steps_used: int64 ``[N]``, the denoising steps of each prompt: ``steps`` for all, or with a threshold at least
            the number of blocks and at most ``gen_length``.
        trajectory: Every state of every prompt, if recorded.
    """

    tokens: Tensor
    forward_passes: int
    steps_used: Tensor
    trajectory: Trajectory | None


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    prompts: Sequence[Sequence[int] | Tensor],
    config: SamplerConfig,
    *,
    mask_token_id: int,
    pad_token_id: int,
    eos_token_id: int | None,
    eot_token_id: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    record: bool = False,
    progress: bool = False,
) -> Generation:
    """Generate a continuation of every prompt.

    The result does not depend on ``batch_size`` as long as the denoiser computes each row independently of the others
    and of left padding (to the rounding of its own arithmetic); at temperature 0 with low-confidence remasking no
    random number is drawn and ``generator`` is not touched.

    Args:
        denoiser: The model, ``(ids int64 [B, L], attention_mask bool [B, L]) -> logits [B, L, V]`` in any floating
            dtype, aligned so that ``logits[:, j]`` predicts position ``j``. Called without gradients; its output is
            not changed in place.
        prompts: Token ids, one sequence or one-dimensional integer tensor per prompt; a prompt may be empty.
        config: How to decode.
        mask_token_id: The mask token. It may not occur in a prompt and is never generated.
        pad_token_id: Fills left padding; any token but the mask token.
        eos_token_id: Needed by ``logits_eos_inf`` and ``confidence_eos_eot_inf``.
        eot_token_id: If given, deferred together with EOS by ``confidence_eos_eot_inf``.
        generator: Source of the seeds of the prompts' random streams; torch's global generator if not given.
        device: Where the denoiser expects its inputs; the CPU if not given.
        batch_size: Prompts decoded together, at least 1. Prompts of like lengths go together unless ``record``.
        record: Whether to keep every state, for calibration. Confidences are then computed at prompt positions too.
        progress: Whether to show a progress bar that counts committed tokens.

    Returns:
        The generated tokens, with the trajectory if ``record``.

    Raises:
        ValueError: If a prompt or a token id is not as above, an option needs a token id that is not given, or the
            denoiser returns logits of the wrong shape or dtype, or logits that give no finite confidence (NaN).
    """
    device = torch.device("cpu" if device is None else device)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; valid: an integer of at least 1")
    _check_token_ids(mask_token_id, pad_token_id, eos_token_id, eot_token_id)
    rows = _token_rows(prompts, mask_token_id)
    engine = _Engine(
        denoiser=denoiser,
        config=config,
        mask_token_id=mask_token_id,
        pad_token_id=pad_token_id,
        forbidden=(mask_token_id, *_required_eos(config.logits_eos_inf, "logits_eos_inf", eos_token_id)),
        deferred=(
            *_required_eos(config.confidence_eos_eot_inf, "confidence_eos_eot_inf", eos_token_id),
            *((eot_token_id,) if config.confidence_eos_eot_inf and eot_token_id is not None else ()),
        ),
        device=device,
        record=record,
    )
    streams = _random_streams(len(rows), generator, device) if config.stochastic else [None] * len(rows)
    order = list(range(len(rows)))
    if not record:
        order.sort(key=lambda index: rows[index].numel())  # prompts of like lengths need little padding
    place = torch.tensor(order).argsort()
    with tqdm(total=len(rows) * config.gen_length, unit="token", disable=not progress) as bar:
        parts = [
            engine.decode([rows[index] for index in batch], [streams[index] for index in batch], bar.update)
            for batch in (order[start : start + batch_size] for start in range(0, len(rows), batch_size))
        ]
    recorded = [part.trajectory for part in parts if part.trajectory is not None]
    return Generation(
        tokens=torch.cat([part.tokens for part in parts])[place],
        forward_passes=sum(part.forward_passes for part in parts),
        steps_used=torch.cat([part.steps_used for part in parts])[place],
        trajectory=Trajectory.merge(recorded) if record else None,
    )


@dataclass(frozen=True, eq=False)
class _Engine:
    """Decodes one batch of prompts; holds what is the same for all of them."""

    denoiser: Denoiser
    config: SamplerConfig
    mask_token_id: int
    pad_token_id: int
    forbidden: tuple[int, ...]
    deferred: tuple[int, ...]
    device: torch.device
    record: bool

    def decode(
        self,
        rows: Sequence[Tensor],
        streams: Sequence[torch.Generator | None],
        on_commit: Callable[[int], object],
    ) -> Generation:
        """Decode ``rows`` (int64 ``[l]`` each) together; ``on_commit`` is told how many tokens each step committed."""
        config = self.config
        width = max(row.numel() for row in rows)
        ids, attention = self._left_padded(rows, width)
        position = torch.arange(width + config.gen_length, device=self.device) - width
        block_of_position = position.div(config.block_length, rounding_mode="floor")  # negative in the prompt
        # Without a record, the logits of prompt positions are of no use.
        window = slice(0 if self.record else width, None)
        steps_used = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
        recorder = _Recorder(ids.shape[1], [row.numel() for row in rows], config.gen_length, self.pad_token_id)
        forward_passes = 0
        for _ in range(config.gen_length):  # every step commits at least one token of every prompt that is left
            mask = ids == self.mask_token_id
            alive = mask.any(dim=1).nonzero().squeeze(1)
            if not alive.numel():
                break
            seen, attended, mask = ids[alive], attention[alive], mask[alive]
            block = block_of_position[mask.to(torch.int8).argmax(dim=1)]  # of each row's first mask token
            active = block_of_position == block.unsqueeze(1)
            prompt = attended & (position < 0)
            logits = self._logits(seen, attended, prompt, window)
            candidates = self._candidates(
                logits, mask[:, window], active[:, window], [streams[row] for row in alive.tolist()]
            )
            if not bool(candidates.confidence[attended[:, window]].isfinite().all()):
                raise ValueError("logits of the denoiser give a confidence of NaN; valid: logits without NaN or +inf")
            result = self._commit(seen[:, window], candidates, steps_used[alive])
            if self.record:
                confidence = result.confidence.masked_fill(~attended, 0.0)
                recorder.add(alive, steps_used[alive], seen.to(torch.int32), mask, confidence, result.committed, block)
            ids[alive, window] = result.state
            steps_used[alive] += 1
            forward_passes += 2 if config.cfg_scale > 0 else 1
            on_commit(int(result.committed.sum()))
        return Generation(
            tokens=ids[:, width:].cpu(),
            forward_passes=forward_passes,
            steps_used=steps_used.cpu(),
            trajectory=recorder.trajectory() if self.record else None,
        )

    def _left_padded(self, rows: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
        """Ids and attention mask ``[B, width + gen_length]`` of the initial, fully masked state."""
        ids = torch.full((len(rows), width + self.config.gen_length), self.pad_token_id, dtype=torch.int64)
        ids[:, width:] = self.mask_token_id
        attention = torch.zeros(ids.shape, dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, width - row.numel() : width] = row
            attention[index, width - row.numel() :] = True
        return ids.to(self.device), attention.to(self.device)

    def _logits(self, ids: Tensor, attention: Tensor, prompt: Tensor, window: slice) -> Tensor:
        """Guided logits of the window's positions, forbidden tokens removed."""
        logits = self._run(ids, attention)[:, window]
        if self.config.cfg_scale > 0:
            without_prompt = ids.masked_fill(prompt, self.mask_token_id)
            logits = guide(logits, self._run(without_prompt, attention)[:, window], self.config.cfg_scale)
        largest, vocabulary = max(self.forbidden + self.deferred), logits.shape[-1]
        if largest >= vocabulary:
            raise ValueError(
                f"mask_token_id, eos_token_id or eot_token_id is {largest}; "
                f"valid: 0 to {vocabulary - 1}, the vocabulary of the denoiser's logits"
            )
        return forbid(logits, self.forbidden)

    def _run(self, ids: Tensor, attention: Tensor) -> Tensor:
        logits = self.denoiser(ids, attention)
        if logits.dim() != 3 or logits.shape[:2] != ids.shape or not logits.dtype.is_floating_point:
            raise ValueError(
                f"logits of the denoiser have shape {tuple(logits.shape)} and dtype {logits.dtype}; "
                f"valid: a floating tensor [{ids.shape[0]}, {ids.shape[1]}, V]"
            )
        return logits

    def _candidates(
        self, logits: Tensor, mask: Tensor, active: Tensor, streams: Sequence[torch.Generator | None]
    ) -> Candidates:
        eligible = (mask & active).sum(dim=1).tolist()

        def draw(*shape: int) -> Tensor:
            parts = [
                torch.rand((count, *shape), generator=stream, dtype=torch.float64, device=self.device)
                for count, stream in zip(eligible, streams, strict=True)
            ]
            return torch.cat(parts)

        return propose(
            logits,
            mask,
            active,
            temperature=self.config.temperature,
            uniform=draw(logits.shape[-1]) if self.config.temperature > 0 else None,
            random_score=draw() if self.config.remasking == "random" else None,
            deferred=self.deferred,
        )

    def _commit(self, state: Tensor, candidates: Candidates, steps_used: Tensor) -> StepResult:
        config = self.config
        if config.threshold is not None:
            return commit_above_threshold(state, candidates, config.threshold)
        # Every block starts fully masked and takes the same number of steps, so one schedule serves all.
        per_block = config.steps // config.num_blocks
        schedule = transfer_counts(torch.tensor([config.block_length], device=self.device), per_block)[0]
        return commit_most_confident(state, candidates, schedule[steps_used % per_block])


class _Recorder:
    """Collects the steps of one batch on the CPU."""

    def __init__(self, length: int, prompt_lengths: list[int], gen_length: int, pad_token_id: int) -> None:
        self._length = length
        self._prompt_lengths = prompt_lengths
        self._gen_length = gen_length
        self._pad_token_id = pad_token_id
        self._entries: list[tuple[Tensor, ...]] = []

    def add(self, *entry: Tensor) -> None:
        """Keep (row, step, ids, mask, confidence, committed, block): ``[n]``, the middle four ``[n, length]``."""
        self._entries.append(tuple(value.cpu() for value in entry))

    def trajectory(self) -> Trajectory:
        """Everything added so far, by row and step."""
        row, step, ids, mask, confidence, committed, block = (
            torch.cat(values) for values in zip(*self._entries, strict=True)
        )
        table = (len(self._prompt_lengths), int(step.max()) + 1)

        def placed(values: Tensor, fill: int = 0) -> Tensor:
            tensor = torch.full((*table, *values.shape[1:]), fill, dtype=values.dtype)
            tensor[row, step] = values
            return tensor

        return Trajectory(
            ids=placed(ids, self._pad_token_id),
            mask=placed(mask),
            confidence=placed(confidence.to(torch.float32)),
            committed=placed(committed),
            block=placed(block, -1),
            valid=placed(torch.ones_like(row, dtype=torch.bool)),
            prompt_lengths=torch.tensor(self._prompt_lengths, dtype=torch.int64),
            gen_length=self._gen_length,
            pad_token_id=self._pad_token_id,
        )


def _check_token_ids(mask: int, pad: int, eos: int | None, eot: int | None) -> None:
    for name, token in (
        ("mask_token_id", mask),
        ("pad_token_id", pad),
        ("eos_token_id", eos),
        ("eot_token_id", eot),
    ):
        if token is not None and token < 0:
            raise ValueError(f"{name} is {token}; valid: a token id of at least 0")
    for name, token in (("pad_token_id", pad), ("eos_token_id", eos), ("eot_token_id", eot)):
        if token == mask:
            raise ValueError(f"{name} is {token}; valid: any token other than mask_token_id, which is the same")


def _token_rows(prompts: Sequence[Sequence[int] | Tensor], mask_token_id: int) -> list[Tensor]:
    """The prompts as int64 CPU tensors ``[l]``."""
    if not len(prompts):
        raise ValueError("prompts is empty; valid: at least one prompt")
    rows = [_token_row(index, prompt) for index, prompt in enumerate(prompts)]
    for index, row in enumerate(rows):
        if bool((row < 0).any()):
            raise ValueError(f"prompts[{index}] contains {int(row.min())}; valid: token ids of at least 0")
        if bool((row == mask_token_id).any()):
            where = (row == mask_token_id).nonzero().squeeze(1).tolist()
            raise ValueError(
                f"prompts[{index}] contains the mask token {mask_token_id} at {where}; valid: any other token"
            )
    return rows


def _token_row(index: int, prompt: Sequence[int] | Tensor) -> Tensor:
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1 or prompt.dtype.is_floating_point or prompt.dtype == torch.bool:
            raise ValueError(
                f"prompts[{index}] has shape {tuple(prompt.shape)} and dtype {prompt.dtype}; "
                "valid: a one-dimensional integer tensor"
            )
        return prompt.to("cpu", torch.int64)
    try:
        return torch.tensor([operator.index(token) for token in prompt], dtype=torch.int64)
    except TypeError as error:
        raise ValueError(f"prompts[{index}] is not a sequence of token ids ({error}); valid: integers") from error


def _required_eos(enabled: bool, option: str, eos_token_id: int | None) -> tuple[int, ...]:
    if not enabled:
        return ()
    if eos_token_id is None:
        raise ValueError(f"eos_token_id is None with {option} True; valid: the EOS token of the model")
    return (eos_token_id,)


def _random_streams(
    count: int, generator: torch.Generator | None, device: torch.device
) -> list[torch.Generator | None]:
    """One generator per prompt on the sampling device, seeded in prompt order."""
    source = "cpu" if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (count,), generator=generator, device=source)
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
