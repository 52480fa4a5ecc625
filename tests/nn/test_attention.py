"""Quantized attention against float64 formulas; what installing it on a block may and may not change."""

import copy
import functools
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllmquant.core.iaaq import ValueScales
from dllmquant.core.softmax_search import SoftmaxScales
from dllmquant.nn.attention import AttentionQuantizer, AttentionScheme, install, uninstall
from dllmquant.nn.sdpa import watching_attention

BATCH, HEADS, KV_HEADS, LENGTH, WIDTH = 2, 4, 2, 6, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(kv_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return (
        2 * normal(BATCH, HEADS, LENGTH, WIDTH),
        normal(BATCH, kv_heads, LENGTH, WIDTH, seed=1),
        normal(BATCH, kv_heads, LENGTH, WIDTH, seed=2) + 0.5,
    )


KEEP = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5)) > 0.3
KEEP[1, 0, 3] = False


def value_scales(shape: tuple[int, int]) -> ValueScales:
    nothing = torch.zeros(shape, dtype=torch.float64)
    scale = 0.2 + 0.1 * torch.arange(shape[0] * shape[1]).view(shape) / (shape[0] * shape[1])
    return ValueScales(scale, 6.0 + torch.arange(shape[0])[:, None].expand(shape), nothing, nothing, nothing)


def softmax_scales(grid: Any = "uniform", heads: int = HEADS, range_: Any = "fixed") -> SoftmaxScales:
    nothing = torch.zeros(heads, dtype=torch.float64)
    return SoftmaxScales(grid, range_, torch.tensor([1.0, 0.5, 0.7, 0.3])[:heads], nothing, nothing)


def quantizer_of(kv_heads: int = KV_HEADS, **fields: Any) -> AttentionQuantizer:
    scheme = AttentionScheme(**fields)
    quantizer = AttentionQuantizer(scheme, HEADS, kv_heads, WIDTH)
    shape = (kv_heads, WIDTH if scheme.value_granularity == "channel" else 1)
    quantizer.calibrate(
        values=value_scales(shape) if scheme.has_static_values else None,
        softmax=None if scheme.probs_bits is None else softmax_scales(scheme.probs_grid, range_=scheme.probs_range),
    )
    return quantizer


def dynamic(x: Tensor, bits: int) -> Tensor:
    """Asymmetric per token and head, one at a time."""
    result = torch.empty_like(x)
    for place in torch.cartesian_prod(*map(torch.arange, x.shape[:-1])).tolist():
        token = x[tuple(place)]
        low, high = min(float(token.min()), 0.0), max(float(token.max()), 0.0)
        step = (high - low) / (2**bits - 1)
        zero = round(-low / step)
        result[tuple(place)] = ((token / step).round().add(zero).clamp(0, 2**bits - 1) - zero) * step
    return result


def sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / order**0.5


def nearest_probabilities(probabilities: Tensor, scheme: AttentionScheme) -> Tensor:
    assert scheme.probs_bits is not None
    result, top = torch.empty_like(probabilities), 2**scheme.probs_bits - 1
    levels = [i / top for i in range(top + 1)]
    if scheme.probs_grid != "uniform":
        base = {"log2": 2.0, "log_sqrt2": 2.0**0.5}[scheme.probs_grid]
        levels = [0.0, *(base**-i for i in range(top))]
    for place in torch.cartesian_prod(*map(torch.arange, probabilities.shape[:-1])).tolist():
        row = probabilities[tuple(place)]
        upper = float(row.max()) if scheme.probs_range == "row" else float(softmax_scales().upper[place[1]])
        grid = torch.tensor(levels, dtype=torch.float64) * upper
        result[tuple(place)] = grid[(row[:, None] - grid).abs().argmin(-1)]
    return result


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scheme: AttentionScheme) -> Tensor:
    """Quantized attention head by head, with the scales of `quantizer_of`, everything at once in float64."""
    groups = HEADS // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if scheme.rotate_query_key:
        q, k = q @ sylvester(WIDTH), k @ sylvester(WIDTH)
    if scheme.query_key_bits is not None:
        q, k = dynamic(q, scheme.query_key_bits), dynamic(k, scheme.query_key_bits)
    scores = q @ k.mT / WIDTH**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    probabilities = scores.softmax(-1).nan_to_num()
    if scheme.probs_bits is not None:
        probabilities = nearest_probabilities(probabilities, scheme)
    if scheme.value_bits is not None:
        if scheme.value_granularity == "token":
            v = dynamic(v, scheme.value_bits)
        else:
            scales = value_scales((KV_HEADS, WIDTH if scheme.value_granularity == "channel" else 1))
            for head in range(HEADS):
                step, zero = scales.scale[head // 2].double(), scales.zero[head // 2].double()
                codes = (v[:, head] / step).round() + zero
                v[:, head] = (codes.clamp(0, 2**scheme.value_bits - 1) - zero) * step
    return probabilities @ v


@pytest.mark.parametrize(
    "mask",
    [None, KEEP, KEEP[:, :, :1], KEEP[0, 0], torch.where(KEEP, 0.5, -torch.inf).double()],
    ids=["none", "bool", "padding", "matrix", "float"],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_without_any_bits_it_is_pytorchs_attention(kv_heads, mask):
    q, k, v = qkv(kv_heads)
    quantizer = AttentionQuantizer(AttentionScheme(), HEADS, kv_heads, WIDTH)
    for scale in (None, 0.7):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        result = quantizer.attend(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        torch.testing.assert_close(result, expected)
    expected = F.scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True)
    torch.testing.assert_close(quantizer.attend(q, k, v, None, 0.0, True, enable_gqa=True), expected)
    assert not quantizer.state_dict()


SCHEMES = [
    {"probs_bits": 4},
    {"probs_bits": 3, "probs_grid": "log2"},
    {"probs_bits": 4, "probs_grid": "log_sqrt2"},
    {"probs_bits": 4, "probs_range": "row"},
    {"probs_bits": 4, "probs_grid": "log_sqrt2", "probs_range": "row", "value_bits": 4},
    {"value_bits": 4},
    {"value_bits": 4, "value_granularity": "head"},
    {"value_bits": 4, "value_granularity": "channel"},
    {"query_key_bits": 4},
    {"query_key_bits": 4, "rotate_query_key": True},
    {
        "probs_bits": 4,
        "probs_grid": "log2",
        "value_bits": 3,
        "value_granularity": "channel",
        "query_key_bits": 8,
        "rotate_query_key": True,
    },
]


@pytest.mark.parametrize("mask", [None, KEEP], ids=["none", "bool"])
@pytest.mark.parametrize("fields", SCHEMES, ids=lambda fields: "-".join(map(str, fields.values())))
def test_equals_the_formula(fields, mask):
    quantizer = quantizer_of(**fields)
    q, k, v = qkv(KV_HEADS)
    expected = reference(q, k, v, mask, quantizer.scheme)
    result = quantizer.attend(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(result, F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True), rtol=1e-4)
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))  # as models without enable_gqa do
    torch.testing.assert_close(quantizer.attend(q, k, v, mask), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fields", SCHEMES, ids=lambda fields: "-".join(map(str, fields.values())))
def test_chunks_change_nothing(fields, monkeypatch):
    q, k, v = qkv(KV_HEADS)
    quantizer = quantizer_of(**fields)
    expected = quantizer.attend(q, k, v, KEEP, enable_gqa=True)
    monkeypatch.setattr("dllmquant.nn.sdpa._CHUNK_ELEMENTS_CPU", 3 * LENGTH * LENGTH)
    torch.testing.assert_close(quantizer.attend(q, k, v, KEEP, enable_gqa=True), expected)


def test_rotating_helps_queries_and_keys_with_an_outlier_channel():
    q, k, v = (normal(1, HEADS, 20, 64, seed=seed) for seed in range(3))
    q[..., 3] /= 20  # scores stay moderate
    k[..., 3] *= 20
    expected = F.scaled_dot_product_attention(q, k, v)
    plain, rotated = (
        quantizer_of(query_key_bits=4, rotate_query_key=rotate).attend(q, k, v) for rotate in (False, True)
    )
    assert float((rotated - expected).norm()) < 0.75 * float((plain - expected).norm())


def test_narrow_inputs_keep_their_dtype_and_are_rounded_once():
    quantizer = quantizer_of(**SCHEMES[-1])
    q, k, v = (x.bfloat16() for x in qkv(KV_HEADS))
    result = quantizer.attend(q, k, v, enable_gqa=True)
    assert result.dtype == torch.bfloat16
    wide = quantizer.attend(q.float(), k.float(), v.float(), enable_gqa=True)
    assert torch.equal(result, wide.bfloat16())


def test_casting_moves_but_never_narrows_the_scales():
    quantizer = quantizer_of(probs_bits=4, value_bits=4, value_granularity="channel")
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    assert set(before) == {"value_scale", "value_zero", "probs_scale"}
    for cast in (quantizer.half(), quantizer.to(torch.bfloat16), quantizer.double()):
        for name, tensor in cast.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, before[name])
    assert all(tensor.device.type == "meta" for tensor in quantizer.to("meta").state_dict().values())


@pytest.mark.parametrize("assign", [True, False])
def test_loading_into_an_empty_quantizer(assign):
    source = quantizer_of(probs_bits=4, value_bits=4, value_granularity="head")
    with pytest.raises(ValueError, match="value_scale holds values that are not positive finite numbers"):
        AttentionQuantizer(source.scheme, HEADS, KV_HEADS, WIDTH).check_scales()
    empty = AttentionQuantizer(source.scheme, HEADS, KV_HEADS, WIDTH, device="meta")
    if not assign:
        empty = empty.to_empty(device="cpu")
    empty.load_state_dict(source.state_dict(), assign=assign)
    empty.check_scales()
    q, k, v = qkv(KV_HEADS)
    assert torch.equal(empty.attend(q, k, v, enable_gqa=True), source.attend(q, k, v, enable_gqa=True))


class Block(nn.Module):
    """Attention over its input, followed by `after`, and repeated `depth` times by calling itself."""

    def __init__(self, eager: bool = False) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.eager = eager
        self.after: nn.Module = nn.Identity()

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        if self.eager:
            return x
        x = self.after(F.scaled_dot_product_attention(x * self.gain, x, x))
        result: Tensor = self(x, depth - 1) if depth > 1 else x
        return result


X = normal(BATCH, HEADS, LENGTH, WIDTH)
FIELDS: dict[str, Any] = {"probs_bits": 3, "value_bits": 3, "value_granularity": "head"}


def installed() -> Block:
    block = Block()
    install(block, quantizer_of(HEADS, **FIELDS))
    return block


def quantized(x: Tensor) -> Tensor:
    return quantizer_of(HEADS, **FIELDS).attend(x, x, x)


def test_installed_blocks_quantize_and_others_do_not():
    block = installed()
    assert torch.equal(block(X), quantized(X))
    assert torch.equal(block(X), quantized(X))
    assert torch.equal(Block()(X), F.scaled_dot_product_attention(X, X, X))
    assert torch.equal(block(X, depth=3), quantized(quantized(quantized(X))))
    assert set(block.state_dict()) == {
        "gain",
        *(f"attention_quantizer.{n}" for n in ("value_scale", "value_zero", "probs_scale")),
    }


def test_a_watcher_outside_sees_only_what_is_not_quantized():
    seen: list[object] = []
    with watching_attention(seen.append):
        installed()(X)
    assert not seen


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["inside", "before", "after"])
def test_errors_leave_no_interception_behind(place, error):
    """Not even KeyboardInterrupt, on which PyTorch skips forward hooks."""
    block = installed()

    def fail(*_: object) -> None:
        raise error

    if place == "inside":
        block.attention_quantizer.register_forward_pre_hook(fail)
        block.after = block.attention_quantizer
    else:
        (block.register_forward_pre_hook if place == "before" else block.register_forward_hook)(fail)
    with pytest.raises(error):
        block(X)
    assert torch.equal(Block()(X), F.scaled_dot_product_attention(X, X, X))


def test_another_number_of_heads_is_an_error():
    with pytest.raises(ValueError, match="query: 3 heads; valid: 4, as calibrated"):
        quantizer_of(probs_bits=4).attend(X[:, :3], X[:, :3], X[:, :3])


def test_threads_do_not_share_interceptions():
    block, results = installed(), {}

    def run(name: str, module: nn.Module) -> None:
        results[name] = [module(X) for _ in range(20)]

    threads = [threading.Thread(target=run, args=pair) for pair in (("plain", Block()), ("quantized", block))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, F.scaled_dot_product_attention(X, X, X)) for result in results["plain"])
    assert all(torch.equal(result, quantized(X)) for result in results["quantized"])


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))], ids=["copy", "pickle"]
)
def test_copies_are_independent(clone):
    block = installed()
    other = clone(nn.Sequential(block))[0]
    assert torch.equal(other(X), quantized(X))
    with torch.no_grad():
        other.gain.zero_()
        other.attention_quantizer.probs_scale.fill_(0.25)
    assert not torch.equal(other(X), quantized(X))
    assert torch.equal(block(X), quantized(X))
    uninstall(other)
    with torch.no_grad():
        other.gain.fill_(1)
    assert torch.equal(other(X), F.scaled_dot_product_attention(X, X, X))
    assert torch.equal(block(X), quantized(X))


def test_uninstalling_restores_the_block():
    block = installed()
    quantizer = block.attention_quantizer
    assert uninstall(block) is quantizer
    assert torch.equal(block(X), F.scaled_dot_product_attention(X, X, X))
    assert "forward" not in block.__dict__
    assert set(block.state_dict()) == {"gain"}
    install(block, quantizer)
    assert torch.equal(block(X), quantized(X))


def test_a_forward_that_was_wrapped_before_stays_wrapped():
    block = Block()
    wrapped = functools.partial(block.forward)
    block.__dict__["forward"] = wrapped
    install(block, quantizer_of(HEADS, **FIELDS))
    block(X)
    uninstall(block)
    assert block.__dict__["forward"] is wrapped


def test_attention_that_escapes_is_an_error():
    block = Block(eager=True)
    install(block, quantizer_of(HEADS, **FIELDS))
    with pytest.raises(RuntimeError, match="Block ran without calling scaled_dot_product_attention"):
        block(X)


def test_installing_twice_and_uninstalling_nothing_are_errors():
    block = installed()
    with pytest.raises(ValueError, match="Block has an attention_quantizer already"):
        install(block, quantizer_of(HEADS, **FIELDS))
    uninstall(block)
    with pytest.raises(ValueError, match="Block has no attention_quantizer installed"):
        uninstall(block)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"probs_bits": 1}, "probs_bits: 1; valid: 2 to 8, or None"),
        ({"value_bits": 9}, "value_bits: 9; valid"),
        ({"query_key_bits": 4.0}, "query_key_bits: 4.0; valid"),
        ({"probs_grid": "log"}, "probs_grid: 'log' is unknown; valid: uniform, log2, log_sqrt2"),
        ({"probs_range": "head"}, "probs_range: 'head' is unknown; valid: fixed, row"),
        ({"value_granularity": "row"}, "value_granularity: 'row'; valid: token, head, channel"),
        ({"rotate_query_key": True}, "rotate_query_key: True has no effect without query_key_bits"),
    ],
)
def test_scheme_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionScheme(**fields)


def test_calibration_errors():
    static = AttentionQuantizer(AttentionScheme(4, value_bits=4, value_granularity="head"), HEADS, KV_HEADS, WIDTH)
    with pytest.raises(ValueError, match="values: missing, which does not fit AttentionScheme"):
        static.calibrate()
    for odd in (softmax_scales("log2"), softmax_scales(range_="row")):
        with pytest.raises(ValueError, match=rf"softmax: on the {odd.grid} grid \({odd.range}\), which does not fit"):
            static.calibrate(values=value_scales((KV_HEADS, 1)), softmax=odd)
    with pytest.raises(ValueError, match=r"value_scale: shape \(2, 8\), expected \(2, 1\)"):
        static.calibrate(values=value_scales((KV_HEADS, WIDTH)))
    with pytest.raises(ValueError, match=r"probs_scale: shape \(3,\), expected \(4,\)"):
        static.calibrate(values=value_scales((KV_HEADS, 1)), softmax=softmax_scales(heads=3))
    bad = value_scales((KV_HEADS, 1))
    bad.scale[0] = 0
    with pytest.raises(ValueError, match="value_scale holds values that are not positive finite numbers"):
        static.calibrate(values=bad)
    plain = AttentionQuantizer(AttentionScheme(value_bits=4), HEADS, KV_HEADS, WIDTH)
    with pytest.raises(ValueError, match="values: given, which does not fit"):
        plain.calibrate(values=value_scales((KV_HEADS, 1)))
    with pytest.raises(ValueError, match="softmax: on the uniform grid"):
        plain.calibrate(softmax=softmax_scales())
    q, k, v = qkv(1)
    with pytest.raises(ValueError, match="value: 1 heads of 8 channels do not fit 2 calibrated ones"):
        quantizer_of(value_bits=4, value_granularity="head").attend(q, k, v, enable_gqa=True)
