"""The LLaDA architecture, slowly: float64 numpy, one sequence, one head and one position at a time.

Written from the architecture's description, not from the package. Weights come under the published state-dict names;
a bias is used where the state dict has one; the output matrix is the embedding where there is no `ff_out`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Architecture:
    """The part of the configuration that weights do not tell."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    rope_theta: float
    rms_norm_eps: float
    input_emb_norm: bool = False
    scale_logits: bool = False


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) · gain, row by row of [length, width]."""
    out = np.empty_like(x)
    for row in range(len(x)):
        out[row] = x[row] / np.sqrt(np.mean(x[row] * x[row]) + eps) * gain
    return out


def rotate(vector: Array, position: int, theta: float) -> Array:
    """Rotates the pair (i, i + half) of a head's vector by position / theta^(2i / head_dim)."""
    size = len(vector)
    half = size // 2
    out = np.empty_like(vector)
    for i in range(half):
        angle = position / theta ** (2 * i / size)
        cos, sin = np.cos(angle), np.sin(angle)
        out[i] = vector[i] * cos - vector[i + half] * sin
        out[i + half] = vector[i + half] * cos + vector[i] * sin
    return out


def linear(weights: Mapping[str, Array], name: str, x: Array) -> Array:
    """x Wᵀ, plus the bias if there is one."""
    y = np.einsum("li,oi->lo", x, weights[f"{name}.weight"])
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def attention(
    weights: Mapping[str, Array], block: str, h: Array, arch: Architecture, visible: NDArray[np.bool_]
) -> Array:
    """Softmax attention over the keys each query may see: `visible` [heads, length, length]; none seen gives zeros."""
    length, width = h.shape
    size = width // arch.n_heads
    q, k, v = (linear(weights, f"{block}.{name}_proj", h) for name in "qkv")
    out = np.zeros((length, width))
    for head in range(arch.n_heads):
        shared = head // (arch.n_heads // arch.n_kv_heads)
        own, its = slice(head * size, (head + 1) * size), slice(shared * size, (shared + 1) * size)
        queries = [rotate(q[j, own], j, arch.rope_theta) for j in range(length)]
        keys = [rotate(k[j, its], j, arch.rope_theta) for j in range(length)]
        for j in range(length):
            seen = np.flatnonzero(visible[head, j])
            if not len(seen):
                continue
            scores = np.array([queries[j] @ keys[i] for i in seen]) / np.sqrt(size)
            probabilities = np.exp(scores - scores.max())
            probabilities /= probabilities.sum()
            out[j, own] = sum(p * v[i, its] for p, i in zip(probabilities, seen, strict=True))
    return linear(weights, f"{block}.attn_out", out)


def feed_forward(weights: Mapping[str, Array], block: str, h: Array) -> Array:
    """ff_out(silu(ff_proj h) · up_proj h)."""
    gate, up = linear(weights, f"{block}.ff_proj", h), linear(weights, f"{block}.up_proj", h)
    return linear(weights, f"{block}.ff_out", gate / (1 + np.exp(-gate)) * up)


def logits(
    weights: Mapping[str, Array],
    ids: list[int],
    arch: Architecture,
    *,
    keep: list[bool] | None = None,
    visible: NDArray[np.bool_] | None = None,
) -> Array:
    """Logits [length, embedding rows] of one sequence.

    `keep` hides tokens (padding) from every position; `visible` [heads, length, length] says who sees whom.
    """
    length = len(ids)
    if visible is None:
        visible = np.ones((arch.n_heads, length, length), dtype=bool)
    if keep is not None:
        visible = visible & np.array(keep)[None, None, :]
    body = "model.transformer"
    x = np.stack([weights[f"{body}.wte.weight"][token] for token in ids]).astype(np.float64)
    width = x.shape[1]
    if arch.input_emb_norm:
        x = x * np.sqrt(width)
    for layer in range(arch.n_layers):
        block = f"{body}.blocks.{layer}"
        h = rms_norm(x, weights[f"{block}.attn_norm.weight"], arch.rms_norm_eps)
        x = x + attention(weights, block, h, arch, visible)
        h = rms_norm(x, weights[f"{block}.ff_norm.weight"], arch.rms_norm_eps)
        x = x + feed_forward(weights, block, h)
    x = rms_norm(x, weights[f"{body}.ln_f.weight"], arch.rms_norm_eps)
    if f"{body}.ff_out.weight" in weights:
        out = linear(weights, f"{body}.ff_out", x)
    else:
        out = np.einsum("li,oi->lo", x, weights[f"{body}.wte.weight"])
    return out / np.sqrt(width) if arch.scale_logits else out
