"""Toy denoisers for the decoding tests."""

import torch
from torch import Tensor

MASK, PAD, EOS, EOT = 10, 0, 1, 2
VOCABULARY = 11


class MixingDenoiser:
    """Random logits that depend on every attended token and its relative distance, in float64.

    `calls` records the shapes it was called with; `dirty_padding` makes logits at padding NaN, as softmax over fully
    hidden keys does in some models.
    """

    def __init__(self, seed: int, *, vocabulary: int = VOCABULARY, dirty_padding: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.embedding = normal(vocabulary, 12)
        self.distance = normal(201)
        self.head = normal(12, vocabulary)
        self.dirty_padding = dirty_padding
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert ids.dtype == torch.int64
        assert attention_mask.dtype == torch.bool
        self.calls.append(tuple(ids.shape))
        position = torch.arange(ids.shape[1])
        kernel = self.distance[position[:, None] - position[None, :] + 100]
        mixed = torch.einsum("qk,bkd->bqd", kernel, self.embedding[ids] * attention_mask[..., None])
        logits = 1.5 * torch.tanh(mixed / 3) @ self.head
        if self.dirty_padding:
            logits[~attention_mask] = float("nan")
        return logits

    def one(self, ids: list[int]) -> list[list[float]]:
        """The same model as the oracles call it."""
        attention = torch.ones((1, len(ids)), dtype=torch.bool)
        return self(torch.tensor([ids]), attention)[0].tolist()


class FixedDenoiser:
    """The same logits [G, V] at the last G positions whatever the input; 0 before them."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = torch.zeros((*ids.shape, self.logits.shape[-1]), dtype=self.logits.dtype)
        out[:, -self.logits.shape[0] :] = self.logits
        return out


def certain(tokens: list[int], strength: list[float], vocabulary: int = VOCABULARY) -> FixedDenoiser:
    """A denoiser that wants `tokens[j]` at generated position j with logit `strength[j]` (all others 0)."""
    logits = torch.zeros((len(tokens), vocabulary), dtype=torch.float64)
    logits[torch.arange(len(tokens)), torch.tensor(tokens)] = torch.tensor(strength, dtype=torch.float64)
    return FixedDenoiser(logits)
