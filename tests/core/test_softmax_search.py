"""The search for the softmax quantizer against loops over states, heads, queries and candidates in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dllmquant.core.softmax_search import UPPER_ENDS, SoftmaxSearch

HEADS, QUERIES, KEYS, CHANNELS, BITS = 3, 5, 7, 2, 3


def state(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A [heads, q, k], V [heads, k, channels] and w [q]; heads differ in how sharply they attend."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(HEADS, QUERIES, KEYS, generator=generator, dtype=torch.float64)
    sharpness = torch.tensor([0.2, 2.0, 8.0], dtype=torch.float64)[:, None, None]
    values = torch.randn(HEADS, KEYS, CHANNELS, generator=generator, dtype=torch.float64) + 1
    return (sharpness * scores).softmax(-1), values, torch.rand(QUERIES, generator=generator, dtype=torch.float64)


STATES = [state(seed) for seed in range(4)]


def search_over(
    states: list[tuple[Tensor, Tensor, Tensor]], *, rows: int = HEADS, weighted: bool = True
) -> SoftmaxSearch:
    search = SoftmaxSearch(HEADS, BITS)
    for probabilities, values, weights in states:
        for part in torch.arange(HEADS).split(rows):
            w = weights.expand(len(part), -1) if weighted else None
            search.add(probabilities[part], values[part], part, w)
    return search


def nearest(p: float, end: float, grid: str) -> float:
    levels = 2**BITS - 1
    if grid == "uniform":
        candidates = np.array([end * code / levels for code in range(levels + 1)])
    else:
        base = 2.0 if grid == "log2" else 2.0**0.5
        candidates = np.array([0.0, *(end * base**-code for code in range(levels))])
    return float(candidates[np.abs(candidates - p).argmin()])


def brute_force(grid: str, weighted: bool = True) -> np.ndarray:
    """L [candidates, heads], one number at a time; the last candidate is the row's largest probability."""
    table = np.zeros((len(UPPER_ENDS) + 1, HEADS))
    for index, end in enumerate([*np.array(UPPER_ENDS, np.float32).astype(float), None]):
        for probabilities, values, weights in STATES:
            for head in range(HEADS):
                for i in range(QUERIES):
                    row = probabilities[head, i].numpy()
                    delta = np.array([nearest(p, row.max() if end is None else end, grid) - p for p in row])
                    w = float(weights[i]) if weighted else 1.0
                    table[index, head] += w * float(((delta @ values[head].numpy()) ** 2).sum())
    return table


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("grid", ["uniform", "log2", "log_sqrt2"])
def test_equals_brute_force(grid, weighted):
    table = brute_force(grid, weighted)
    result = search_over(STATES, weighted=weighted).result(grid)
    assert (result.grid, result.range) == (grid, "fixed")
    best = table[:-1].argmin(0)
    np.testing.assert_allclose(result.upper.numpy(), np.array(UPPER_ENDS, np.float32)[best])
    np.testing.assert_allclose(result.error.numpy(), table[:-1].min(0), rtol=1e-9)
    rows = search_over(STATES, weighted=weighted).result(grid, "row")
    assert (rows.grid, rows.range, rows.upper.tolist()) == (grid, "row", [1.0] * HEADS)
    np.testing.assert_allclose(rows.error.numpy(), table[-1], rtol=1e-9)
    np.testing.assert_allclose(rows.full_range_error.numpy(), table[0], rtol=1e-9)
    np.testing.assert_allclose(result.full_range_error.numpy(), table[0], rtol=1e-9)
    assert (result.error <= result.full_range_error).all()
    assert result.upper.dtype == torch.float32


def test_diffuse_heads_get_a_lower_end():
    """Head 0 attends evenly, at about 1/7: with s = 1, 3 bits round every probability to the same level."""
    result = search_over(STATES).result("uniform")
    assert result.upper[0] < result.upper[2]
    assert result.error[0] < 0.5 * result.full_range_error[0]


def test_rows_may_come_in_any_portions_and_accumulators_merge():
    expected = search_over(STATES).table
    torch.testing.assert_close(search_over(STATES, rows=1).table, expected)
    merged = search_over(STATES[:1])
    merged.merge(search_over(STATES[1:]))
    torch.testing.assert_close(merged.table, expected)


def test_ties_go_to_the_full_range():
    assert SoftmaxSearch(2, 4).result("log2").upper.tolist() == [1.0, 1.0]


def test_errors():
    for ends in ((), (0.5, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match=r"ends: .*; valid: positive numbers, the first of them 1"):
            SoftmaxSearch(2, 4, ends)
    for other in (
        SoftmaxSearch(3, 4),
        SoftmaxSearch(2, 3),
        SoftmaxSearch(2, 4, (1.0, 0.5)),
        SoftmaxSearch(2, 4, (1.0,)),
    ):
        with pytest.raises(ValueError, match="other: it searches other grids"):
            SoftmaxSearch(2, 4, (1.0, 0.4)).merge(other)
