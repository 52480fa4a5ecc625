"""The LLaDA2 architecture, slowly: float64 numpy, one sequence, one head, one position and one expert at a time.

Written from the architecture's description, not from the package. Weights come under the published state-dict names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.oracles.llada_reference import Array, linear, rms_norm, rotate


@dataclass(frozen=True)
class Architecture:
    """The part of the configuration that weights do not tell."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotated: int
    rope_theta: float
    rms_norm_eps: float
    dense_layers: int
    n_experts: int
    n_groups: int
    kept_groups: int
    chosen: int
    scaling: float
    block_length: int


@dataclass
class Routing:
    """What the routers of a run decided.

    Attributes:
        margins: By how much each decision was made: the worst chosen minus the best not chosen, of groups and experts.
        chosen: The experts of every token of every mixture block, in order.
        unbiased: The same if the bias were zero.
    """

    margins: list[float] = field(default_factory=list)
    chosen: list[list[int]] = field(default_factory=list)
    unbiased: list[list[int]] = field(default_factory=list)


def block_causal(keep: list[bool], block_length: int) -> NDArray[np.bool_]:
    """Who sees whom, [length, length]: real tokens of the own block and of earlier ones, counted from the first."""
    length, first = len(keep), keep.index(True)
    visible = np.zeros((length, length), dtype=bool)
    for query in range(first, length):
        for key in range(first, length):
            visible[query, key] = keep[key] and (key - first) // block_length <= (query - first) // block_length
    return visible


def attention(
    weights: Mapping[str, Array], name: str, h: Array, arch: Architecture, visible: NDArray[np.bool_]
) -> Array:
    """Softmax attention with normed, partly rotated queries and keys; a query that sees nothing gives zeros."""
    length, size = len(h), arch.head_dim
    fused = linear(weights, f"{name}.query_key_value", h).reshape(length, -1, size)
    assert fused.shape[1] == arch.n_heads + 2 * arch.n_kv_heads

    def prepared(head: int, position: int, norm: str) -> Array:
        vector = rms_norm(fused[position : position + 1, head], weights[f"{name}.{norm}.weight"], arch.rms_norm_eps)[0]
        turned = rotate(vector[: arch.rotated], position, arch.rope_theta)
        return np.concatenate([turned, vector[arch.rotated :]])

    out = np.zeros((length, arch.n_heads, size))
    for head in range(arch.n_heads):
        shared = head // (arch.n_heads // arch.n_kv_heads)
        keys = [prepared(arch.n_heads + shared, position, "key_layernorm") for position in range(length)]
        values = fused[:, arch.n_heads + arch.n_kv_heads + shared]
        for position in range(length):
            seen = np.flatnonzero(visible[position])
            if not len(seen):
                continue
            query = prepared(head, position, "query_layernorm")
            scores = np.array([query @ keys[other] for other in seen]) / np.sqrt(size)
            probabilities = np.exp(scores - scores.max())
            probabilities /= probabilities.sum()
            out[position, head] = sum(p * values[other] for p, other in zip(probabilities, seen, strict=True))
    return linear(weights, f"{name}.dense", out.reshape(length, -1))


def feed_forward(weights: Mapping[str, Array], name: str, h: Array) -> Array:
    """down_proj(silu(gate_proj h) · up_proj h)."""
    gate, up = linear(weights, f"{name}.gate_proj", h), linear(weights, f"{name}.up_proj", h)
    return linear(weights, f"{name}.down_proj", gate / (1 + np.exp(-gate)) * up)


def best(values: list[tuple[float, int]], count: int) -> tuple[list[int], float]:
    """The `count` items of the largest values, and by how much the last of them beats the next."""
    ranked = sorted(values, reverse=True)
    margin = ranked[count - 1][0] - ranked[count][0] if count < len(ranked) else float("inf")
    return [item for _, item in ranked[:count]], margin


def choose(scores: Array, arch: Architecture) -> tuple[list[int], float]:
    """The experts of one token: the best of the groups whose two best experts have the largest sums."""
    size = arch.n_experts // arch.n_groups
    groups = []
    for group in range(arch.n_groups):
        first, second = sorted(scores[group * size : (group + 1) * size], reverse=True)[:2]
        groups.append((float(first + second), group))
    kept, group_margin = best(groups, arch.kept_groups)
    open_experts = [(float(scores[expert]), expert) for expert in range(arch.n_experts) if expert // size in kept]
    experts, margin = best(open_experts, arch.chosen)
    return experts, min(margin, group_margin)


def mixture(weights: Mapping[str, Array], name: str, h: Array, arch: Architecture, routing: Routing) -> Array:
    """What the shared experts say of every token, plus the weighted sum of what its own experts say."""
    out = feed_forward(weights, f"{name}.shared_experts", h)
    for position in range(len(h)):
        scores = 1 / (1 + np.exp(-(weights[f"{name}.gate.weight"] @ h[position])))
        experts, margin = choose(scores + weights[f"{name}.gate.expert_bias"], arch)
        routing.margins.append(margin)
        routing.chosen.append(experts)
        routing.unbiased.append(choose(scores, arch)[0])
        total = sum(scores[expert] for expert in experts) if arch.chosen > 1 else 1.0
        for expert in experts:
            said = feed_forward(weights, f"{name}.experts.{expert}", h[position : position + 1])[0]
            out[position] += arch.scaling * scores[expert] / total * said
    return out


def logits(
    weights: Mapping[str, Array],
    ids: list[int],
    arch: Architecture,
    visible: NDArray[np.bool_],
    routing: Routing | None = None,
) -> Array:
    """Logits [length, vocabulary] of one sequence; `visible` [length, length] says who sees whom."""
    routing = Routing() if routing is None else routing
    x = np.stack([weights["model.word_embeddings.weight"][token] for token in ids]).astype(np.float64)
    for layer in range(arch.n_layers):
        block = f"model.layers.{layer}"
        h = rms_norm(x, weights[f"{block}.input_layernorm.weight"], arch.rms_norm_eps)
        x = x + attention(weights, f"{block}.attention", h, arch, visible)
        h = rms_norm(x, weights[f"{block}.post_attention_layernorm.weight"], arch.rms_norm_eps)
        if layer < arch.dense_layers:
            x = x + feed_forward(weights, f"{block}.mlp", h)
        else:
            x = x + mixture(weights, f"{block}.mlp", h, arch, routing)
    x = rms_norm(x, weights["model.norm.weight"], arch.rms_norm_eps)
    return linear(weights, "lm_head", x)
