"""The searches of quantized attention by brute force, in float64 numpy, sharing no code with them.

Every candidate is tried on the whole attention of all calls: softmax grids, their ends, and the shrink ratios of static
value scales. Nothing is accumulated in portions, and levels are found by comparing with all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ENDS = [2.0 ** (-step / 2) for step in range(17)]
RATIOS = [1 - 0.02 * step for step in range(11)]
BASES = {"log2": 2.0, "log_sqrt2": 2.0**0.5}


@dataclass(frozen=True)
class Call:
    """One attention call and what its tokens count.

    Attributes:
        query: [batch, heads, length, width].
        key: [batch, key heads, length, width].
        value: [batch, value heads, length, channels].
        real: bool [batch, length], False on padding, which nobody attends to.
        weights: [batch, length], of queries.
    """

    query: Array
    key: Array
    value: Array
    real: NDArray[np.bool_]
    weights: Array

    def spread(self, x: Array) -> Array:
        """Repeats heads until every query head has its own."""
        return np.repeat(x, self.query.shape[1] // x.shape[1], axis=1)

    def probabilities(self, bits: int | None, rotate: bool) -> Array:
        """The softmax, of queries and keys in `bits`, [batch, heads, q, k]."""
        query, key = self.query, self.spread(self.key)
        if rotate:
            rotation = np.ones((1, 1))
            while len(rotation) < query.shape[-1]:
                rotation = np.block([[rotation, rotation], [rotation, -rotation]])
            rotation = rotation / np.sqrt(len(rotation))
            query, key = query @ rotation, key @ rotation
        if bits is not None:
            query, key = per_token(query, bits), per_token(key, bits)
        scores = query @ np.swapaxes(key, -1, -2) / np.sqrt(query.shape[-1])
        exponents = np.where(self.real[:, None, None], np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
        return exponents / exponents.sum(-1, keepdims=True)

    def error(self, output: Array) -> Array:
        """Σ w ‖·‖² of [batch, heads, q, channels], by head and channel."""
        return np.einsum("bhqc,bq->hc", output**2, self.weights)


def per_token(x: Array, bits: int) -> Array:
    """Rounds every token of a head to its own asymmetric grid, which holds zero."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    step = (high - low) / (2**bits - 1)
    zero = np.rint(-low / step)
    return (np.clip(np.rint(x / step) + zero, 0, 2**bits - 1) - zero) * step


def round_probabilities(probabilities: Array, upper: Array, bits: int, grid: str) -> Array:
    """Takes the nearest of all levels of a grid that ends at `upper`."""
    top = 2**bits - 1
    levels = [i / top for i in range(top + 1)] if grid == "uniform" else [0.0, *(BASES[grid] ** -i for i in range(top))]
    nearest, distance = np.zeros_like(probabilities), np.full_like(probabilities, np.inf)
    for level in levels:
        off = np.abs(probabilities - level * upper)
        nearest, distance = np.where(off < distance, level * upper, nearest), np.minimum(off, distance)
    return nearest


@dataclass(frozen=True)
class SoftmaxChoice:
    """A kind of softmax quantizer: its ends by head, its errors by head and channel (full range: from 0 to 1)."""

    grid: str
    range: str
    ends: Array
    error: Array
    full_range_error: Array

    def apply(self, probabilities: Array, bits: int) -> Array:
        """Rounds probabilities [batch, heads, q, k]."""
        upper = probabilities.max(-1, keepdims=True) if self.range == "row" else self.ends[:, None, None]
        return round_probabilities(probabilities, upper, bits, self.grid)


def search_softmax(calls: Sequence[Call], attention: Sequence[Array], bits: int, grid: str, kind: str) -> SoftmaxChoice:
    """Finds the ends of one kind of grid: of all 17 for every head, or each row's largest probability."""
    heads = attention[0].shape[1]

    def error(choice: SoftmaxChoice) -> Array:
        pairs = zip(calls, attention, strict=True)
        return np.sum([c.error((choice.apply(a, bits) - a) @ c.spread(c.value)) for c, a in pairs], axis=0)

    nothing = np.zeros(0)
    fixed = np.stack([error(SoftmaxChoice(grid, "fixed", np.full(heads, end), nothing, nothing)) for end in ENDS])
    if kind == "row":
        row = error(SoftmaxChoice(grid, "row", np.ones(heads), nothing, nothing))
        return SoftmaxChoice(grid, "row", np.ones(heads), row, fixed[0])
    best = fixed.sum(-1).argmin(0)
    return SoftmaxChoice(grid, "fixed", np.array(ENDS)[best], fixed[best, np.arange(heads)], fixed[0])


@dataclass(frozen=True)
class ValueChoice:
    """Static value scales [value heads, 1 or channels]: steps, zero points, ratios, and their errors."""

    step: Array
    zero: Array
    ratio: Array
    error: Array
    full_range_error: Array


def search_values(
    calls: Sequence[Call],
    rounded: Sequence[Array],
    bits: int,
    granularity: str,
    value_heads: int,
    ratios: Sequence[float],
) -> ValueChoice:
    """Finds the shrink ratio of every scale, with the softmax as it will be rounded."""
    heads, channels, top = calls[0].query.shape[1], calls[0].value.shape[-1], 2**bits - 1
    width = channels if granularity == "channel" else 1
    shape = (value_heads, width)
    step, zero, errors = (np.zeros((len(ratios), *shape)) for _ in range(3))
    every = [np.swapaxes(call.spread(call.value), 1, 2)[call.real] for call in calls]  # all tokens but padding
    pool = np.concatenate(every).reshape(-1, value_heads, heads // value_heads, channels)
    for head, column in np.ndindex(shape):
        seen = pool[:, head] if width == 1 else pool[:, head, :, column]
        low, high = seen.min(), seen.max()
        for index, ratio in enumerate(ratios):
            step[index, head, column] = np.float32(ratio * (high - low) / top)  # as it is stored
            zero[index, head, column] = np.rint(top / 2 - (low + high) / 2 / step[index, head, column])
    for index in range(len(ratios)):
        own_step, own_zero = (np.repeat(x[index], heads // value_heads, axis=0)[:, None] for x in (step, zero))
        for call, probabilities in zip(calls, rounded, strict=True):
            value = call.spread(call.value)
            codes = np.clip(np.rint(value / own_step) + own_zero, 0, top)
            of_heads = call.error(probabilities @ ((codes - own_zero) * own_step - value))
            of_values = of_heads.reshape(value_heads, -1, channels).sum(1)
            errors[index] += of_values if width > 1 else of_values.sum(1, keepdims=True)
    best = errors.argmin(0)[None]
    chosen = (np.take_along_axis(x, best, 0)[0] for x in (step, zero, errors))
    step, zero, error = chosen
    return ValueChoice(step, zero, np.array(ratios)[best[0]], error, errors[0])
