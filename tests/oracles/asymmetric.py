"""GPTAQ and Qronos on the tokens themselves, in float64 numpy: the reference of both solvers, sharing no code.

There is no Hessian, no inverse and no factor here. The inputs of both paths are matrices of tokens, each row scaled by
√weight; damping is rows of white noise, the same in both. Every step is `lstsq` on them, for the columns not rounded
yet. Group ranges and rounding are those of `obs`.
"""

from dataclasses import dataclass

import numpy as np

from tests.oracles import obs
from tests.oracles.obs import Array


@dataclass(frozen=True)
class Paths:
    """The tokens [tokens, in] of both paths and their weights [tokens]."""

    full: Array
    quantized: Array
    weights: Array


def problem(seed: int, rows: int = 4, columns: int = 24, count: int = 60) -> tuple[Array, Paths]:
    """A weight and correlated tokens of uneven weights, which the quantized path shrinks, mixes and blurs."""
    random = np.random.default_rng(seed)
    full = random.normal(size=(count, 6)) @ random.normal(size=(6, columns))
    full += 0.4 * random.normal(size=(count, columns))
    mix = 0.9 * np.eye(columns) + 0.05 * random.normal(size=(columns, columns))
    quantized = full @ mix + 0.2 * random.normal(size=(count, columns))
    return random.normal(size=(rows, columns)), Paths(full, quantized, (random.random(count) + 0.7) ** 2)


def tokens(x: Array, weights: Array) -> Array:
    """Rows whose Gram matrix is the weighted mean of x xᵀ."""
    return x * np.sqrt(weights / weights.sum())[:, None]


def least_squares(columns: Array, output: Array) -> Array:
    """The weight [out, columns] whose output [tokens, out] comes closest."""
    solution = np.linalg.lstsq(columns, output, rcond=None)[0]
    return solution.T.astype(np.float64)


def solve(  # noqa: C901 - one long loop on purpose
    method: str,
    weight: Array,
    paths: Paths,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    *,
    act_order: bool = False,
    clip: str = "none",
    damping: float = 0.01,
) -> obs.Oracle:
    """Rounds a weight [out, in]. Dead columns (a zero one in the quantized path) must not occur here.

    "qronos": the first column is set to its best value beside the others as they are, the others to their best beside
    it; from there on, each column is rounded and all later ones are fitted anew to the full-precision output.
    "gptaq": each column is rounded and the later ones are moved so that their output changes by what that column lost:
    by rounding, and, with its weight as it was before, by its own input being another in the quantized path.
    Groups are fitted when their first column is reached, with `act_order` before the first column is rounded.
    """
    rows, columns = weight.shape
    width = group_size or columns
    plain, plain_quantized = tokens(paths.full, paths.weights), tokens(paths.quantized, paths.weights)
    diagonal = (plain_quantized**2).sum(0)
    noise = np.sqrt(damping * diagonal.mean()) * np.eye(columns)
    x, xq = np.concatenate((plain, noise)), np.concatenate((plain_quantized, noise))
    target = x @ weight.T
    w = weight.copy()
    remaining = sorted(range(columns), key=lambda q: -diagonal[q]) if act_order else list(range(columns))
    if method == "qronos":
        first, rest = remaining[:1], remaining[1:]
        w[:, first] = least_squares(xq[:, first], target - xq[:, rest] @ w[:, rest].T)
        w[:, rest] = least_squares(xq[:, rest], target - xq[:, first] @ w[:, first].T)

    codes = np.zeros((rows, columns), dtype=np.int64)
    scale = np.zeros((rows, columns // width))
    zero = np.zeros_like(scale)

    def fit_group(group: int) -> None:
        part = slice(group * width, (group + 1) * width)
        for row in range(rows):
            scale[row, group], zero[row, group] = obs.fit(w[row, part], bits, symmetric, clip, diagonal[part])

    if act_order:
        for group in range(columns // width):
            fit_group(group)
    done: list[int] = []
    while remaining:
        q, remaining = remaining[0], remaining[1:]
        done.append(q)
        if not act_order and q % width == 0:
            fit_group(q // width)
        before = w[:, q].copy()
        for row in range(rows):
            s, z = scale[row, q // width], zero[row, q // width]
            codes[row, q] = obs.snap(w[row, q], s, z, bits)
            w[row, q] = (codes[row, q] - z) * s
        if remaining and method == "qronos":
            w[:, remaining] = least_squares(xq[:, remaining], target - xq[:, done] @ w[:, done].T)
        if remaining and method == "gptaq":
            lost = np.outer(xq[:, q], before - w[:, q]) + np.outer(x[:, q] - xq[:, q], before)
            w[:, remaining] += least_squares(xq[:, remaining], lost)
    return obs.Oracle(codes, scale, zero, w, loss(weight, w, paths))


def loss(weight: Array, restored: Array, paths: Paths) -> float:
    """E‖W x − Ŵ x̃‖² − E‖W x − W x̃‖², one token at a time."""
    total = 0.0
    for x, xq, importance in zip(paths.full, paths.quantized, paths.weights, strict=True):
        output = weight @ x
        rounded, unrounded = output - restored @ xq, output - weight @ xq
        total += importance * float(rounded @ rounded - unrounded @ unrounded)
    return total / float(paths.weights.sum())
