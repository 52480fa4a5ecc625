"""WUSH by what characterises it: balanced moments, constant diagonals, and the least error of its model."""

import pytest
import torch
from scipy.linalg import sqrtm

from dllmquant.core.hadamard import hadamard_matrix
from dllmquant.transforms.wush import fit_wush

WIDTH, SIZE = 24, 8


def problem(seed=0, rank=WIDTH, outs=(40, 30)):
    """Correlated activations with outlier channels, and two weights that read them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = draw(400, rank) @ draw(rank, WIDTH)
    x[:, 3] *= 30
    x[:, 17] *= 8
    weights = [draw(out, WIDTH) @ (draw(WIDTH, WIDTH) / 5) for out in outs]
    return x, x.T @ x / len(x), weights


def blocks_of(matrix):
    return [matrix[i : i + SIZE, i : i + SIZE] for i in range(0, len(matrix), SIZE)]


def weight_moment(weights):
    rows = torch.cat(list(weights))
    return sum((torch.outer(row, row) for row in rows), torch.zeros(WIDTH, WIDTH, dtype=torch.float64)) / len(rows)


def error_model(matrix, input_moment, output_moment):
    inverse = torch.linalg.inv(matrix)
    return float((matrix.T @ input_moment @ matrix).trace() * (inverse @ output_moment @ inverse.T).trace())


def test_the_function_is_preserved():
    x, hessian, weights = problem()
    transform = fit_wush(hessian, weights, block_size=SIZE)
    assert [(step.kind, step.size) for step in transform.steps] == [("block", SIZE)]
    for weight in weights:
        moved = transform.inverse_transpose_weight(weight)
        assert torch.allclose(transform(x) @ moved.T, x @ weight.T, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_moments_are_equal_and_have_constant_diagonals(seed):
    _, hessian, weights = problem(seed)
    transform = fit_wush(hessian, weights, block_size=SIZE, damping=0.0)
    after_x = blocks_of(transform.transform_hessian(hessian))
    after_w = blocks_of(weight_moment([transform.inverse_transpose_weight(weight) for weight in weights]))
    before = zip(blocks_of(hessian), blocks_of(weight_moment(weights)), strict=True)
    for (s_x, s_w), x, w in zip(before, after_x, after_w, strict=True):
        size = float(x.diagonal().mean())
        assert torch.allclose(x, w, atol=1e-4 * size)
        for moment in (x, w):
            assert torch.allclose(moment.diagonal(), torch.full_like(moment.diagonal(), size), rtol=1e-4)
        # Both are Qᵀ Σ Q, and Σ² are the eigenvalues of S_w S_x, which no factorization is needed for.
        sigma = torch.linalg.eigvals(s_w @ s_x).real.sqrt().sort().values
        assert torch.allclose(torch.linalg.eigvalsh(x), sigma, rtol=1e-3)


def test_no_other_transform_has_a_smaller_model_error():
    _, hessian, weights = problem()
    fitted = blocks_of(fit_wush(hessian, weights, block_size=SIZE, damping=0.0).matrix())
    generator = torch.Generator().manual_seed(5)
    ours, rotated = 0.0, 0.0
    for block, s_x, s_w in zip(fitted, blocks_of(hessian), blocks_of(weight_moment(weights)), strict=True):
        least = error_model(block, s_x, s_w)
        root = sqrtm((s_w @ s_x).numpy())
        assert least == pytest.approx(float(root.trace().real) ** 2, rel=1e-4)  # the bound, (tr Σ)²
        smooth = torch.diag((s_w.diagonal() / s_x.diagonal()) ** 0.25)  # the best diagonal transform
        others = [hadamard_matrix(SIZE), torch.eye(SIZE, dtype=torch.float64), smooth]
        for _ in range(200):
            random = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator)
            others += [random, block + 0.1 * random * block.norm() / SIZE]
        assert min(error_model(other, s_x, s_w) for other in others) > least * (1 - 1e-6)
        ours, rotated = ours + least, rotated + error_model(hadamard_matrix(SIZE), s_x, s_w)
    assert ours < 0.5 * rotated


def test_rounding_error_falls_below_that_of_a_hadamard_rotation():
    """The model is not the truth, but on real 4-bit grids it should point the right way."""
    x, hessian, weights = problem()
    weight = weights[0]

    def rounded(values):
        grouped = values.unflatten(-1, (-1, SIZE))
        scale = grouped.abs().amax(-1, keepdim=True) / 7
        return (torch.round(grouped / scale) * scale).flatten(-2)

    def error(matrix):
        moved = torch.linalg.solve(matrix, weight.T).T
        return float((rounded(x @ matrix) @ rounded(moved).T - x @ weight.T).square().mean())

    rotation = torch.block_diag(*[hadamard_matrix(SIZE)] * (WIDTH // SIZE))
    fitted = fit_wush(hessian, weights, block_size=SIZE).matrix()
    assert error(fitted) < 0.8 * min(error(rotation), error(torch.eye(WIDTH, dtype=torch.float64)))


def test_moments_are_damped_relative_to_their_block():
    """A fit with damping is the fit without it to damped moments."""
    _, hessian, weights = problem()
    damping = 0.3
    damped = hessian.clone()
    moment = weight_moment(weights)
    for start in range(0, WIDTH, SIZE):
        cut = slice(start, start + SIZE)
        for matrix in (damped, moment):
            matrix[cut, cut] += damping * matrix[cut, cut].trace() / SIZE * torch.eye(SIZE, dtype=torch.float64)
    stand_in = torch.linalg.cholesky(moment).T * WIDTH**0.5  # rows whose mean moment is the damped one
    with_damping = fit_wush(hessian, weights, block_size=SIZE, damping=damping)
    without = fit_wush(damped, [stand_in], block_size=SIZE, damping=0.0)
    for fit in (with_damping, without):
        assert torch.allclose(fit.transform_hessian(damped), without.transform_hessian(damped), rtol=1e-3, atol=1e-3)
    assert torch.allclose(with_damping.matrix().abs(), without.matrix().abs(), rtol=1e-3, atol=1e-4)


def test_all_rows_of_all_weights_count_once():
    _, hessian, weights = problem()
    together = fit_wush(hessian, [torch.cat(weights)], block_size=SIZE).matrix()
    assert torch.allclose(fit_wush(hessian, weights, block_size=SIZE).matrix(), together, atol=1e-6)
    assert not torch.allclose(fit_wush(hessian, weights[:1], block_size=SIZE).matrix(), together, atol=1e-3)


@pytest.mark.parametrize("damping", [0.1, 0.001])
def test_damping_bounds_the_condition_number(damping):
    _, _, weights = problem(outs=(2,))
    hessian = torch.diag(torch.tensor([1e8] + [1e-8] * (WIDTH - 1), dtype=torch.float64))
    matrix = fit_wush(hessian, weights, block_size=SIZE, damping=damping).matrix()
    assert max(float(torch.linalg.cond(block)) for block in blocks_of(matrix)) <= SIZE / damping + 1


@pytest.mark.parametrize("case", ["dead channel", "dead block", "low rank", "few rows", "unread block"])
def test_singular_moments_give_a_usable_transform(case):
    x, hessian, weights = problem(rank=3 if case == "low rank" else WIDTH, outs=(2,) if case == "few rows" else (40,))
    dead = {"dead channel": [9], "dead block": list(range(8, 16))}.get(case, [])
    x[:, dead] = 0
    hessian[dead], hessian[:, dead] = 0, 0
    if case == "unread block":
        weights[0][:, 8:16] = 0
    transform = fit_wush(hessian, weights, block_size=SIZE)
    moved = transform.inverse_transpose_weight(weights[0])
    assert bool(torch.isfinite(moved).all())
    assert torch.allclose(transform(x) @ moved.T, x @ weights[0].T, rtol=1e-9, atol=1e-7)
    assert float(torch.linalg.cond(transform.matrix()).max()) < 1e4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_inputs_are_fitted_in_float64(dtype):
    _, hessian, weights = problem()
    hessian, weights = hessian.float(), [weight.to(dtype) for weight in weights]
    wide = fit_wush(hessian.double(), [weight.double() for weight in weights], block_size=SIZE)
    assert torch.equal(fit_wush(hessian, weights, block_size=SIZE).matrix(), wide.matrix())


def test_blocks_of_paley_orders_work_too():
    _, hessian, weights = problem()
    moved = fit_wush(hessian, weights, block_size=12, damping=0.0).transform_hessian(hessian)
    assert float(moved[:12, :12].diagonal().std()) < 1e-4 * float(moved[:12, :12].diagonal().mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": torch.zeros(24, 8)}, r"hessian: shape \(24, 8\)"),
        ({"weights": []}, "weights: empty"),
        ({"weights": [torch.zeros(4, 8)]}, r"weights: shape \(4, 8\); valid: \(out, 24\)"),
        ({"weights": [torch.full((4, 24), torch.inf)]}, "finite"),
        ({"block_size": 16}, "does not divide"),
        ({"block_size": 6}, "order 6"),
        ({"damping": -0.1}, "damping: -0.1"),
        ({"hessian": torch.diag(torch.arange(24.0)), "damping": 0.0}, "hessian: the moment of block 0"),
        ({"weights": [torch.ones(1, 24)], "damping": 0.0}, "weights: the moment of block 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_errors(change, message):
    _, hessian, weights = problem()
    arguments = {"hessian": hessian, "weights": weights, "block_size": SIZE} | change
    with pytest.raises(ValueError, match=message):
        fit_wush(arguments.pop("hessian"), arguments.pop("weights"), **arguments)
