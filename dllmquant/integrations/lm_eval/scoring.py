"""Scores of given targets: the likelihood bound, and whether greedy decoding gives the target."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dllmquant.decoding import Denoiser, SamplerConfig, guide, sample
from dllmquant.decoding.likelihood import log_likelihoods

Pair = tuple[list[int], list[int]]
GreedyCheck = Literal["one_step", "one_by_one", "skip"]


@dataclass(frozen=True)
class Scorer:
    """Scores targets under a model.

    Attributes:
        denoiser: The model, as for `log_likelihoods`.
        mask_token_id: The mask token.
        pad_token_id: Fills padding.
        mc_num: Masks drawn per target.
        batch_size: Sequences per forward pass.
        seed: Seed of the masks.
        cfg_scale: Scale of classifier-free guidance; 0 is off, otherwise every forward pass is two.
        device: Where the denoiser expects its inputs.
    """

    denoiser: Denoiser
    mask_token_id: int
    pad_token_id: int
    mc_num: int
    batch_size: int
    seed: int
    cfg_scale: float
    device: torch.device

    def bounds(self, pairs: Sequence[Pair], streams: Sequence[int]) -> list[float]:
        """Estimates the log-likelihood bound of every target given its prompt, in nats.

        Args:
            pairs: Token ids of (prompt, target).
            streams: The random stream of each pair; pairs of one stream and target length share their masks.
        """
        if not self.cfg_scale:
            return self._bounds(self.denoiser, pairs, streams)
        found = [0.0] * len(pairs)
        for length, members in _grouped([len(target) for _, target in pairs]).items():
            denoiser = self._guided(length)
            values = self._bounds(denoiser, [pairs[i] for i in members], [streams[i] for i in members])
            for index, value in zip(members, values, strict=True):
                found[index] = value
        return found

    def greedy(self, pairs: Sequence[Pair], check: GreedyCheck) -> list[bool]:
        """Tells of every target whether greedy decoding from its prompt gives exactly it.

        The canvas is as long as the target. "one_step" commits the likeliest token of every position at once,
        "one_by_one" one token per step, the most confident first, as LLaDA's evaluation does; "skip" gives False.
        """
        if check == "skip":
            return [False] * len(pairs)
        wanted = list(dict.fromkeys((tuple(prompt), len(target)) for prompt, target in pairs))
        decoded: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for length, members in _grouped([length for _, length in wanted]).items():
            keys = [wanted[index] for index in members]
            rows = self._decoded([prompt for prompt, _ in keys], length, 1 if check == "one_step" else length)
            decoded |= dict(zip(keys, rows, strict=True))
        return [decoded[tuple(prompt), len(target)] == target for prompt, target in pairs]

    def _bounds(self, denoiser: Denoiser, pairs: Sequence[Pair], streams: Sequence[int]) -> list[float]:
        values: list[float] = log_likelihoods(
            denoiser,
            pairs,
            mask_token_id=self.mask_token_id,
            pad_token_id=self.pad_token_id,
            mc_num=self.mc_num,
            batch_size=self.batch_size,
            seed=self.seed,
            streams=streams,
            device=self.device,
        ).tolist()
        return values

    def _guided(self, length: int) -> Denoiser:
        """The denoiser with guidance, for sequences whose last `length` positions are the target."""

        def denoise(ids: Tensor, attention_mask: Tensor) -> Tensor:
            prompt = attention_mask.clone()
            prompt[:, -length:] = False
            free = self.denoiser(ids.masked_fill(prompt, self.mask_token_id), attention_mask)
            return guide(self.denoiser(ids, attention_mask), free, self.cfg_scale)

        return denoise

    def _decoded(self, prompts: Sequence[Sequence[int]], length: int, steps: int) -> list[list[int]]:
        rows: list[list[int]] = sample(
            self.denoiser,
            prompts,
            SamplerConfig(steps=steps, gen_length=length, block_length=length, cfg_scale=self.cfg_scale),
            mask_token_id=self.mask_token_id,
            pad_token_id=self.pad_token_id,
            device=self.device,
            batch_size=self.batch_size,
        ).tokens.tolist()
        return rows


def _grouped(lengths: Sequence[int]) -> dict[int, list[int]]:
    """Indices by length."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    return groups
