"""Input transforms against whole matrices in float64, built step by step from the definition."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllmquant.core.hadamard import hadamard_matrix, random_signs
from dllmquant.nn.transform import InputTransform, TransformStep

WIDTH = 24
STEPS = st.lists(
    st.one_of(
        st.builds(TransformStep, st.just("block"), st.sampled_from([1, 2, 3, 8, 24])),
        st.just(TransformStep("permute")),
        st.builds(
            TransformStep, st.just("hadamard"), st.sampled_from([1, 2, 4, 8, 12, 24]), st.none() | st.integers(0, 9)
        ),
    ),
    min_size=1,
    max_size=4,
)


def random_transform(steps, seed=0, width=WIDTH):
    """A transform with random tensors, and its matrix [width, width] in float64."""
    rng = np.random.default_rng(seed)
    tensors, whole = [], np.eye(width)
    for step in steps:
        if step.kind == "block":
            stored = (rng.normal(size=(width // step.size, step.size, step.size)) / 3 + np.eye(step.size)).astype("f4")
            tensors.append(torch.from_numpy(stored))
            matrix = scipy.linalg.block_diag(*stored.astype("f8"))
        elif step.kind == "permute":
            order = rng.permutation(width)
            tensors.append(torch.from_numpy(order))
            matrix = np.zeros((width, width))
            matrix[order, np.arange(width)] = 1
        else:
            signs = np.ones(width) if step.seed is None else random_signs(width, step.seed).numpy()
            matrix = signs[:, None] * np.kron(np.eye(width // step.size), hadamard_matrix(step.size).numpy())
        whole = whole @ matrix
    return InputTransform.from_tensors(width, steps, tensors), whole


MIXED = (
    TransformStep("block", 8),
    TransformStep("permute"),
    TransformStep("hadamard", 12, seed=1),
    TransformStep("block", 3),
    TransformStep("hadamard", 24),
)


@settings(deadline=None, max_examples=40)
@given(STEPS, st.integers(0, 999))
def test_every_operation_equals_that_of_the_whole_matrix(steps, seed):
    transform, whole = random_transform(steps, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, WIDTH, dtype=torch.float64, generator=generator)
    cross = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
    condition = float(np.linalg.cond(whole))
    assert np.allclose(transform.matrix().numpy(), whole, atol=1e-10)
    assert np.allclose(transform(x).numpy(), x.numpy() @ whole, atol=1e-10)
    moved = transform.inverse_transpose_weight(weight)
    assert np.allclose(moved.numpy() @ whole.T, weight.numpy(), atol=1e-12 * condition)
    assert torch.allclose(transform(x) @ moved.T, x @ weight.T, atol=1e-12 * condition)
    expected = whole.T @ cross.numpy() @ whole
    assert np.allclose(transform.transform_hessian(cross).numpy(), expected, atol=1e-9)


def test_the_moment_of_transformed_tokens_is_the_transformed_moment():
    transform, _ = random_transform(MIXED)
    x = torch.randn(50, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = transform(x)
    assert torch.allclose(transform.transform_hessian(x.T @ x / 50), moved.T @ moved / 50, atol=1e-10)


@pytest.mark.parametrize("order", [384, 512, 28 * 8])
def test_large_hadamard_orders_are_applied_factor_by_factor(order):
    transform = InputTransform(2 * order, (TransformStep("hadamard", order, seed=4),))
    x = torch.randn(3, 2 * order, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    signed = (x * random_signs(2 * order, 4)).view(3, 2, order)
    assert torch.allclose(transform(x), (signed @ hadamard_matrix(order)).flatten(1), atol=1e-10)
    assert transform.nbytes == 0


def test_permutation_takes_channels_in_its_order():
    order = torch.tensor([2, 0, 3, 1])
    transform = InputTransform.from_tensors(4, (TransformStep("permute"),), (order,))
    x = torch.tensor([[10.0, 11.0, 12.0, 13.0]])
    assert transform(x).tolist() == [[12.0, 10.0, 13.0, 11.0]]
    assert transform.get_buffer("step_0").dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_are_rounded_once_at_the_end(dtype):
    transform, whole = random_transform(MIXED)
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.from_numpy(x.double().numpy() @ whole)
    result = transform(x)
    assert result.dtype == dtype
    error = (result.double() - expected).abs()
    assert bool((error <= torch.finfo(dtype).eps / 2 * expected.abs() + 1e-5).all())


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_weights_and_moments_come_back_at_least_in_float32(dtype, result):
    transform, whole = random_transform(MIXED)
    weight = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    moved = transform.inverse_transpose_weight(weight)
    assert moved.dtype == result
    exact = torch.from_numpy(weight.double().numpy() @ np.linalg.inv(whole).T)
    assert torch.allclose(moved, exact.to(result), rtol=1e-6, atol=1e-6)  # float64 inside: only the result is rounded
    assert transform.transform_hessian((weight.T @ weight).to(dtype)).dtype == result
    assert transform.matrix(dtype).dtype == dtype


def test_the_function_is_preserved_with_stored_blocks():
    """Blocks given in float64 are rounded; the weight is transformed with what is stored."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randn(3, 8, 8, dtype=torch.float64, generator=generator) + 3 * torch.eye(8, dtype=torch.float64)
    transform = InputTransform.from_tensors(WIDTH, (TransformStep("block", 8),), (blocks,))
    x, weight = (torch.randn(9, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2))
    assert not torch.equal(transform.matrix(), torch.block_diag(*blocks))
    assert torch.equal(transform.matrix(), torch.block_diag(*blocks.float()).double())
    assert torch.allclose(transform(x) @ transform.inverse_transpose_weight(weight).T, x @ weight.T, atol=1e-12)


def test_from_json_on_meta_and_loaded_it_is_the_same_transform():
    transform, _ = random_transform(MIXED)
    text = json.dumps([dataclasses.asdict(step) for step in transform.steps])
    with torch.device("meta"):
        empty = InputTransform(WIDTH, [TransformStep(**entry) for entry in json.loads(text)])
    assert empty.steps == transform.steps
    assert all(buffer.is_meta for buffer in empty.buffers())
    explicit = InputTransform(WIDTH, transform.steps, device="meta")
    saved = transform.state_dict()
    assert list(saved) == ["step_0", "step_1", "step_3"]
    for target in (empty, explicit):
        shapes = {name: (buffer.shape, buffer.dtype) for name, buffer in target.state_dict().items()}
        assert shapes == {name: (buffer.shape, buffer.dtype) for name, buffer in saved.items()}
        target.load_state_dict(saved, assign=True)
        x = torch.randn(4, WIDTH)
        assert torch.equal(target(x), transform(x))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_casting_the_module_leaves_the_buffers_alone(cast):
    transform, _ = random_transform(MIXED)
    before = copy.deepcopy(transform.state_dict())
    wrapped = cast(torch.nn.Sequential(transform, torch.nn.Linear(WIDTH, 2)))
    assert wrapped[1].weight.dtype != torch.float32
    for name, buffer in transform.state_dict().items():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


def test_moving_to_another_device_with_a_cast_moves_the_buffers():
    transform, _ = random_transform(MIXED)
    transform.to("meta", torch.bfloat16)
    assert {buffer.device.type for buffer in transform.buffers()} == {"meta"}
    assert {buffer.dtype for buffer in transform.buffers()} == {torch.float32, torch.int32}


def test_tables_made_in_inference_mode_serve_gradients_later():
    transform = InputTransform(44, (TransformStep("hadamard", 44, seed=77),))  # an order and a seed no other test uses
    with torch.inference_mode():
        transform(torch.ones(1, 44))
    x = torch.ones(1, 44, requires_grad=True)
    transform(x).square().sum().backward()
    assert torch.allclose(x.grad, 2 * torch.ones(1, 44), atol=1e-5)  # ‖x T‖ = ‖x‖


def test_no_tokens_are_no_error():
    """An expert may be sent none."""
    transform, _ = random_transform(MIXED)
    assert transform(torch.zeros(0, WIDTH)).shape == (0, WIDTH)
    assert transform(torch.zeros(WIDTH)).shape == (WIDTH,)


def test_size_and_repr():
    transform, _ = random_transform(MIXED)
    assert transform.nbytes == 4 * (3 * 64 + WIDTH + 8 * 9)
    assert repr(transform) == "InputTransform(24, block 8 · permute · hadamard 12 · block 3 · hadamard 24)"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "rotate", "size": 8}, "kind: 'rotate' is unknown; valid: block, permute, hadamard"),
        ({"kind": "block"}, "size: None; valid for kind block: a positive integer"),
        ({"kind": "block", "size": 0}, "size: 0"),
        ({"kind": "hadamard", "size": 8.0}, "size: 8.0"),
        ({"kind": "hadamard", "size": True}, "size: True"),
        ({"kind": "permute", "size": 8}, "size: 8; valid for kind permute: None"),
        ({"kind": "block", "size": 8, "seed": 0}, "seed: 0"),
        ({"kind": "hadamard", "size": 8, "seed": "a"}, "seed: 'a'"),
    ],
    ids=str,
)
def test_bad_steps_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        TransformStep(**fields)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((), "steps: empty"),
        ((TransformStep("block", 7),), "size: 7 of step block does not divide the 24"),
        ((TransformStep("permute"), TransformStep("hadamard", 16)), "size: 16 of step hadamard does not divide"),
        ((TransformStep("hadamard", 6),), "no Hadamard matrix of order 6"),
    ],
    ids=str,
)
def test_bad_specifications_are_errors(steps, message):
    with pytest.raises(ValueError, match=message):
        InputTransform(WIDTH, steps)


def test_bad_tensors_are_errors():
    block, permute = TransformStep("block", 8), TransformStep("permute")
    good = torch.eye(8).repeat(3, 1, 1)

    def attempt(step, *tensors):
        InputTransform.from_tensors(WIDTH, (step,), tensors)

    with pytest.raises(ValueError, match="tensors: 0; valid: 1, one for each of step_0"):
        attempt(block)
    with pytest.raises(ValueError, match=r"step_0: shape \(2, 8, 8\); valid: \(3, 8, 8\)"):
        attempt(block, good[:2])
    singular = good.clone()
    singular[1, 4] = singular[1, 5]
    with pytest.raises(ValueError, match="step_0: block 1 is singular or almost so"):
        attempt(block, singular)
    singular[1, 4, 4] += 1e-7
    with pytest.raises(ValueError, match="step_0: block 1 is singular or almost so"):
        attempt(block, singular)
    with pytest.raises(ValueError, match="step_0: a block holds NaN or infinity"):
        attempt(block, good.double() * 1e300)
    with pytest.raises(ValueError, match=r"step_0: not a permutation of 0 ... 23"):
        attempt(permute, torch.zeros(WIDTH, dtype=torch.long))
    with pytest.raises(ValueError, match=r"step_0: not a permutation of 0 ... 23"):
        attempt(permute, torch.arange(WIDTH) + 1)
    attempt(permute, torch.arange(WIDTH, dtype=torch.int32))


def test_bad_inputs_are_errors():
    transform, _ = random_transform(MIXED)
    with pytest.raises(ValueError, match="x: 12 input channels; valid: 24"):
        transform(torch.zeros(2, 12))
    with pytest.raises(ValueError, match="weight: 12 input channels; valid: 24"):
        transform.inverse_transpose_weight(torch.zeros(2, 12))
    with pytest.raises(ValueError, match=r"hessian: shape \(12, 24\)"):
        transform.transform_hessian(torch.zeros(12, 24))
    empty = InputTransform(WIDTH, (TransformStep("block", 8),))
    with pytest.raises(ValueError, match="step_0: block 0 is singular"):
        empty.inverse_transpose_weight(torch.zeros(2, WIDTH))


@pytest.mark.parametrize("steps", [(step,) for step in MIXED] + [MIXED], ids=str)
def test_a_transform_and_its_inverse_cancel(steps):
    assert random_transform(steps)[0].inverse_error() < 1e-12


@pytest.mark.parametrize(
    ("steps", "target", "broken"),
    [
        ((TransformStep("block", 8),), "_inverse_transpose", lambda _name, blocks: torch.linalg.inv(blocks)),
        (MIXED, "_inverse_transpose", lambda _name, blocks: blocks),
        ((TransformStep("hadamard", 8),), "_factors", lambda size, dtype, _device: (torch.ones(8, 8, dtype=dtype),)),
        ((TransformStep("hadamard", 2),), "_signs", lambda length, *_: 2 * torch.ones(length).double()),
    ],
    ids=["block", "mixed", "factors", "signs"],
)
def test_an_inverse_that_is_none_is_seen(steps, target, broken, monkeypatch):
    steps = tuple(dataclasses.replace(step, seed=1) if step.kind == "hadamard" else step for step in steps)
    transform, _ = random_transform(steps)
    monkeypatch.setattr(f"dllmquant.nn.transform.{target}", broken)
    assert transform.inverse_error() > 0.1


def test_tensors_are_copied():
    blocks = torch.eye(8).repeat(3, 1, 1)
    transform = InputTransform.from_tensors(WIDTH, (TransformStep("block", 8),), (blocks,))
    blocks.zero_()
    assert torch.equal(transform.matrix(), torch.eye(WIDTH, dtype=torch.float64))
