"""Intercepted attention against PyTorch's own, for every form a call can take."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllmquant.core.iaaq import interaction
from dllmquant.nn.sdpa import AttentionInputs, Interception, capture_attention, watching_attention

BATCH, HEADS, QUERIES, KEYS, WIDTH = 2, 4, 5, 6, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(kv_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in the layout models have: heads transposed, not contiguous."""
    return (
        normal(BATCH, QUERIES, HEADS, WIDTH).transpose(1, 2),
        normal(BATCH, KEYS, kv_heads, WIDTH, seed=1).transpose(1, 2),
        normal(BATCH, KEYS, kv_heads, 3, seed=2).transpose(1, 2),
    )


KEEP = torch.rand(BATCH, HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(5)) > 0.4
KEEP[1, 2, 3] = KEEP[0, 0, 0] = False  # queries that may attend to nothing
MASKS = {
    "none": None,
    "bool": KEEP,
    "bool-padding": KEEP[:, :1, :1],
    "bool-matrix": KEEP[0, 1],
    "bool-per-head": KEEP[:1],
    "float": normal(BATCH, 1, QUERIES, KEYS, seed=6),
    "float-infinite": torch.zeros(KEEP.shape, dtype=torch.float64).masked_fill(~KEEP, -torch.inf),
    "float-lowest": torch.zeros(KEEP.shape, dtype=torch.float64).masked_fill(~KEEP, torch.finfo(torch.float32).min),
}


def output(inputs: AttentionInputs, chunk: int | None) -> Tensor:
    """Puts the chunks together again by the indices they carry, which come sequence by sequence."""
    rows = [part.batch * HEADS + part.head for part in inputs.probabilities(chunk)]
    assert torch.equal(torch.cat(rows), torch.arange(BATCH * HEADS))
    result = torch.full((BATCH, HEADS, QUERIES, inputs.value.shape[-1]), torch.nan, dtype=torch.float64)
    for part in inputs.probabilities(chunk):
        result[part.batch, part.head] = part.probabilities @ part.values
    return result


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("name", MASKS)
def test_chunks_make_up_pytorchs_attention(name, chunk):
    q, k, v = qkv()
    for scale in (None, 0.3):
        inputs = AttentionInputs.of_call(q, k, v, MASKS[name], scale=scale)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=MASKS[name], scale=scale)
        assert not expected.isnan().any()
        torch.testing.assert_close(output(inputs, chunk), expected)


@pytest.mark.parametrize("chunk", [None, 3])
def test_causal_calls(chunk):
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(output(AttentionInputs.of_call(q, k, v, is_causal=True), chunk), expected)


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_and_repeated_heads(kv_heads, chunk):
    q, k, v = qkv(kv_heads)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(output(AttentionInputs.of_call(q, k, v, enable_gqa=True), chunk), expected)
    k, v = (x.repeat_interleave(HEADS // kv_heads, dim=1) for x in (k, v))
    torch.testing.assert_close(output(AttentionInputs.of_call(q, k, v), chunk), expected)


def test_queries_without_keys_have_no_probabilities():
    q, k, v = qkv()
    for name in ("bool", "float-infinite"):
        for part in AttentionInputs.of_call(q, k, v, MASKS[name]).probabilities():
            keep = KEEP[part.batch, part.head]
            assert (part.probabilities[~keep] == 0).all()
            torch.testing.assert_close(part.probabilities.sum(-1), keep.any(-1).double())


def test_broken_inputs_stay_visible():
    q, k, v = qkv()
    q[0, 0, 0] = torch.nan
    assert next(AttentionInputs.of_call(q, k, v).probabilities()).probabilities.isnan().any()


def test_narrow_inputs_are_computed_in_float32():
    q, k, v = (x.bfloat16() for x in qkv())
    part = next(AttentionInputs.of_call(q, k, v, MASKS["float"]).probabilities())
    assert part.probabilities.dtype == part.values.dtype == torch.float32
    wide = AttentionInputs.of_call(q.double(), k.double(), v.double(), MASKS["float"])
    torch.testing.assert_close(
        part.probabilities.double(), next(wide.probabilities()).probabilities, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("elements", "sizes"), [(1, [1] * 8), (95, [3, 3, 2]), (2**24, [8])])
def test_chunks_bound_the_memory(elements, sizes, monkeypatch):
    monkeypatch.setattr("dllmquant.nn.sdpa._CHUNK_ELEMENTS_CPU", elements)
    assert [len(part.probabilities) for part in AttentionInputs.of_call(*qkv()).probabilities()] == sizes
    assert [len(part.batch) for part in AttentionInputs.of_call(*qkv()).probabilities(3)] == [3, 3, 2]


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_interaction_of_chunks(chunk):
    q, k, v = (normal(BATCH, HEADS, KEYS, WIDTH, seed=seed) for seed in range(3))
    weights = torch.rand(BATCH, KEYS, generator=torch.Generator().manual_seed(0)).double()
    weights[1, :2] = 0
    real = weights > 0
    weights[0, 3] = 0  # a real token all the same
    mask = real[:, None, None]
    inputs = AttentionInputs.of_call(q, k, v, mask)
    probabilities = (q @ k.mT / WIDTH**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    received = inputs.interaction(weights, real, chunk)
    torch.testing.assert_close(received, interaction(probabilities, weights, real))
    assert ((received > 0) == real).all()
    torch.testing.assert_close(inputs.interaction(weights, chunk=chunk), interaction(probabilities, weights))


class Block(nn.Module):
    """Attention, `calls` times."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = nn.functional.scaled_dot_product_attention(x, key=x, value=x, scale=0.5)
        return x


def test_watching_sees_every_call_and_changes_nothing():
    x = normal(BATCH, HEADS, KEYS, WIDTH)
    seen = []
    expected = Block(2)(x)
    with watching_attention(seen.append):
        assert torch.equal(Block(2)(x), expected)
    Block(2)(x)
    assert len(seen) == 2
    assert seen[0].query is x
    assert seen[0].scale == 0.5
    assert seen[0].mask is None


def test_watchers_nest_and_leave_on_errors():
    x = normal(1, 1, 2, 2)
    order = []

    def refuse(inputs: AttentionInputs) -> None:
        raise KeyboardInterrupt

    with watching_attention(lambda _: order.append("outer")), watching_attention(lambda _: order.append("inner")):
        Block()(x)
    assert order == ["inner", "outer"]
    with pytest.raises(KeyboardInterrupt), watching_attention(refuse):
        Block()(x)
    Block()(x)


def test_the_innermost_interception_answers():
    x = normal(1, 1, 2, 2)
    with Interception(lambda *args, **kwargs: torch.zeros(1)) as outer:
        with Interception(lambda *args, **kwargs: torch.ones(2)) as inner:
            assert Block()(x).tolist() == [1, 1]
        assert Block()(x).tolist() == [0]
    assert (outer.calls, inner.calls) == (1, 1)


def test_capture_returns_the_one_call():
    x = normal(BATCH, HEADS, KEYS, WIDTH)
    block = Block()
    assert capture_attention(block, lambda: block(x)).value.shape == (BATCH, HEADS, KEYS, WIDTH)
    for calls in (0, 2):
        with pytest.raises(ValueError, match=f"Block called scaled_dot_product_attention {calls} times, not once"):
            capture_attention(block, lambda count=calls: Block(count)(x))


def test_errors():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"dropout_p: 0\.1; valid: 0"):
        AttentionInputs.of_call(q, k, v, None, 0.1)
    with pytest.raises(ValueError, match="attn_mask: given although is_causal"):
        AttentionInputs.of_call(q, k, v, MASKS["bool"], is_causal=True)
    with pytest.raises(ValueError, match="query: 3 dimensions; valid: query, key and value"):
        AttentionInputs.of_call(q[0], k[0], v[0])
    with pytest.raises(ValueError, match=r"key, value: \[2\] heads; valid: 4, or with enable_gqa a divisor of it"):
        AttentionInputs.of_call(q, k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match=r"key, value: \[3\] heads"):
        AttentionInputs.of_call(q, k[:, :3], v[:, :3], enable_gqa=True)
