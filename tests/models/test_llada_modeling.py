import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from dllmquant.models import LLaDAConfig, LLaDAModelLM, layers
from dllmquant.models.llada import modeling
from tests.models.toys import MASK, PAD, tiny_config, tiny_model
from tests.oracles import llada_reference as oracle

LENGTH = 11
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped-kv": {"d_model": 24, "n_heads": 4, "n_kv_heads": 2, "rope_theta": 500000.0},
    "one-kv-head": {"n_heads": 4, "multi_query_attention": True},
    "qkv-bias": {"include_qkv_bias": True},
    "all-biases": {"include_bias": True, "n_kv_heads": 1},
    "tied": {"weight_tying": True},
    "tied-with-biases": {"weight_tying": True, "include_bias": True},
    "embedding-norm": {"input_emb_norm": True},
    "scaled-logits": {"scale_logits": True},
    "eps": {"rms_norm_eps": 1e-3},
    "default-hidden": {"mlp_hidden_size": None, "mlp_ratio": 2, "n_layers": 1},
}


def architecture(config: LLaDAConfig) -> oracle.Architecture:
    return oracle.Architecture(
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        input_emb_norm=config.input_emb_norm,
        scale_logits=config.scale_logits,
    )


def expected(
    model: LLaDAModelLM, ids: Tensor, keep: Tensor | None = None, visible: NDArray[np.bool_] | None = None
) -> Tensor:
    """The oracle's logits for every row of a batch; `visible` is [batch, heads, length, length]."""
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    rows = [
        oracle.logits(
            weights,
            row,
            architecture(model.config),
            keep=None if keep is None else keep[index].tolist(),
            visible=None if visible is None else visible[index],
        )
        for index, row in enumerate(ids.tolist())
    ]
    return torch.from_numpy(np.stack(rows))


def draw_ids(batch: int = 2, length: int = LENGTH, mask_ratio: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, MASK, (batch, length), generator=generator)
    count = round(mask_ratio * length)
    for row in ids:
        row[torch.randperm(length, generator=generator)[:count]] = MASK
    return ids


def padding(kind: str, batch: int = 2, length: int = LENGTH) -> Tensor | None:
    """Padding masks whose rows are padded by 0, 4, 8, ... tokens."""
    if kind == "none":
        return None
    position = torch.arange(length).expand(batch, length)
    pads = 4 * torch.arange(batch)[:, None]
    return position >= pads if kind == "left" else position < length - pads


def run(model: PreTrainedModel, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=attention_mask).logits
    return logits


@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_reference(variant: str, mask_ratio: float, pad: str) -> None:
    model = tiny_model(dtype=torch.float64, **VARIANTS[variant])
    ids = draw_ids(mask_ratio=mask_ratio)
    keep = padding(pad)
    if keep is not None:
        ids[~keep] = PAD
    logits = run(model, ids, keep)
    reference = expected(model, ids, keep)
    assert logits.dtype == torch.float64
    # The rotary tables are float32 by design; everything else is float64.
    torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)
    # The same in float32, on the tokens that are there.
    shown = slice(None) if keep is None else keep
    torch.testing.assert_close(run(model.float(), ids, keep)[shown], reference[shown].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tolerance_tells_architectures_apart(variant: str) -> None:
    """Each number of the configuration changes logits by far more than the tolerance."""
    model = tiny_model(dtype=torch.float64, **VARIANTS[variant])
    reference = expected(model, draw_ids())
    assert 0.02 < float(reference.std()) < 30
    for name in ("rope_theta", "rms_norm_eps"):
        changed = tiny_model(dtype=torch.float64, **(VARIANTS[variant] | {name: 1.5 * getattr(model.config, name)}))
        assert float((run(changed, draw_ids()) - reference).abs().max()) > 1e-3, name


def test_long_positions_equal_the_reference() -> None:
    """One block over 300 positions, theta as published."""
    model = tiny_model(dtype=torch.float64, n_layers=1, n_heads=1, rope_theta=500000.0)
    ids = draw_ids(batch=1, length=300)
    torch.testing.assert_close(run(model, ids), expected(model, ids), rtol=0, atol=2e-4)


def test_tokens_attend_in_both_directions() -> None:
    model = tiny_model(dtype=torch.float64)
    ids = draw_ids(batch=1)
    before = run(model, ids)
    for changed in (0, LENGTH - 1):
        other = ids.clone()
        other[0, changed] = 1 + ids[0, changed] % (MASK - 1)
        difference = (run(model, other) - before).abs().amax(-1)[0]
        assert bool((difference > 1e-6).all()), changed


def test_rows_of_a_batch_are_independent() -> None:
    model = tiny_model(dtype=torch.float64)
    ids = draw_ids(batch=5)
    together = run(model, ids)
    for row in range(5):
        torch.testing.assert_close(together[row], run(model, ids[row : row + 1])[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(run(model, ids.flip(0)), together.flip(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_influence_tokens(side: str) -> None:
    model = tiny_model(dtype=torch.float64)
    ids = draw_ids(batch=3)
    keep = padding(side, batch=3)
    assert keep is not None
    padded = run(model, ids, keep)
    other = ids.clone()
    other[~keep] = draw_ids(batch=3, seed=1)[~keep]
    assert torch.equal(run(model, other, keep)[keep], padded[keep])
    assert torch.equal(run(model, ids, keep.long()), padded)
    assert bool(padded.isfinite().all())
    for row in range(3):
        alone = run(model, ids[row][keep[row]][None])[0]
        # Shifted positions move the float32 rotary tables by their rounding.
        torch.testing.assert_close(padded[row][keep[row]], alone, rtol=0, atol=1e-4)


def test_an_all_padding_row_is_finite_and_leaves_the_others_alone() -> None:
    model = tiny_model()
    ids = draw_ids(batch=2)
    keep = torch.tensor([[True], [False]]).expand(2, LENGTH)
    logits = run(model, ids, keep)
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits[0], run(model, ids[:1])[0], rtol=0, atol=1e-5)


def block_causal(length: int, block: int) -> Tensor:
    index = torch.arange(length) // block
    return index[:, None] >= index[None, :]


def test_block_causal_masks() -> None:
    model = tiny_model(dtype=torch.float64)
    ids = draw_ids()
    mask = block_causal(LENGTH, 4)[None, None]
    visible = mask.expand(2, 2, LENGTH, LENGTH)
    logits = run(model, ids, visible)
    torch.testing.assert_close(logits, expected(model, ids, visible=visible.numpy()), rtol=0, atol=1e-5)
    for equivalent in (mask, mask.expand(2, 1, -1, -1), mask.expand(1, 2, -1, -1)):
        torch.testing.assert_close(run(model, ids, equivalent), logits, rtol=0, atol=1e-12)
    later = ids.clone()
    later[:, 8:] = MASK
    assert torch.equal(run(model, later, mask)[:, :8], logits[:, :8])


def test_masks_per_head_and_row() -> None:
    model = tiny_model(dtype=torch.float64, n_heads=4, n_kv_heads=2)
    ids = draw_ids()
    visible = torch.rand((2, 4, LENGTH, LENGTH), generator=torch.Generator().manual_seed(0)) < 0.5
    torch.testing.assert_close(
        run(model, ids, visible), expected(model, ids, visible=visible.numpy()), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "shape",
    [
        (2, LENGTH - 1),
        (3, LENGTH),
        (LENGTH,),
        (2, LENGTH, LENGTH),
        (2, 1, 1, LENGTH),
        (2, 1, LENGTH, LENGTH - 1),
        (2, 1, LENGTH - 1, LENGTH),
        (3, 1, LENGTH, LENGTH),
        (2, 3, LENGTH, LENGTH),
    ],
)
def test_masks_of_a_wrong_shape_are_errors(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"attention_mask: shape \(.*does not fit inputs \(2, 11\)"):
        run(tiny_model(), draw_ids(), torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_four_dimensional_masks_must_be_boolean(dtype: torch.dtype) -> None:
    """A float mask could mean "added to the scores" or "1 = attended"."""
    with pytest.raises(ValueError, match="attention_mask: 4-D masks must be bool"):
        run(tiny_model(), draw_ids(), torch.ones((2, 1, LENGTH, LENGTH), dtype=dtype))


# bfloat16


def coarse_rotary_cos_sin(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotary tables as a model cast to bfloat16 would compute them: positions and frequencies have 8 bits."""
    exponents = torch.arange(0, head_dim, 2, device=device) / head_dim
    frequencies = (1.0 / theta**exponents).bfloat16()
    angles = torch.outer(torch.arange(length, device=device).bfloat16(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def test_bfloat16_stays_near_float32_at_long_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(n_layers=1, n_heads=1, rope_theta=500000.0).bfloat16()
    ids = draw_ids(batch=1, length=1200)
    low = run(model, ids)
    assert low.dtype == torch.bfloat16
    monkeypatch.setattr(modeling, "rotary_cos_sin", coarse_rotary_cos_sin)
    coarse = run(model, ids)
    monkeypatch.undo()
    reference = run(model.float(), ids)  # the same, already rounded weights

    def error(logits: Tensor) -> float:
        return float((logits.float() - reference).norm() / reference.norm())

    # bfloat16 keeps 8 bits, a relative step of 2⁻⁸, and there are a few roundings on the way.
    assert error(low) < 8 * 2**-8
    assert error(coarse) > 50 * 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotations_keep_distances_at_long_positions(dtype: torch.dtype) -> None:
    """The score of two rotated vectors depends on their distance, not on where they stand; exact up to rounding."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn((1, 1, 1, 64), generator=generator).to(dtype).expand(1, 1, 4096, 64) for _ in range(2))

    def spread(cos: Tensor, sin: Tensor) -> float:
        rotated_q, rotated_k = layers.apply_rotary(q, cos, sin), layers.apply_rotary(k, cos, sin)
        assert rotated_q.dtype == dtype
        scores = (rotated_q[..., 7:, :].float() * rotated_k[..., :-7, :].float()).sum(-1)
        return float((scores - scores[..., :1]).abs().max())

    assert spread(*layers.rotary_cos_sin(4096, 64, 500000.0, q.device)) < 0.1
    assert spread(*coarse_rotary_cos_sin(4096, 64, 500000.0, q.device)) > 3.0


def test_norms_are_computed_in_float32() -> None:
    """The squares of these values overflow float16 and their mean needs more than bfloat16's eight bits."""
    norm = layers.RMSNorm(512, 1e-5)
    x = 300 * torch.randn((4, 512), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        low = x.to(dtype)
        reference = F.rms_norm(low.double(), (512,), eps=1e-5)
        assert torch.equal(norm.to(dtype)(low), reference.to(dtype))


def test_rotary_tables_are_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        wide = layers.rotary_cos_sin(64, 8, 10000.0, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    narrow = layers.rotary_cos_sin(64, 8, 10000.0, torch.device("cpu"))
    assert all(table.dtype == torch.float32 and table.shape == (64, 8) for table in wide + narrow)
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))


# Configuration


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", True),
        ("attention_layer_norm", True),
        ("block_type", "sequential"),
        ("layer_norm_type", "default"),
        ("rope", False),
        ("activation_type", "gelu"),
        ("layer_norm_with_affine", False),
        ("bias_for_layer_norm", True),
        ("clip_qkv", 8.0),
        ("rope_full_precision", False),
    ],
)
def test_unsupported_variants_are_errors(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key}={value!r} is not supported; valid: "):
        tiny_config(**{key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "n_heads=3 must divide d_model=16"),
        ({"n_heads": 16}, "n_heads=16 must divide d_model=16 into even head sizes"),
        ({"n_heads": 0}, "n_heads=0 must divide"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
        ({"n_kv_heads": 0}, "n_kv_heads=0 must divide"),
        ({"embedding_size": 30}, "embedding_size=30 is below vocab_size=31"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("changes", "biased"),
    [
        ({}, []),
        ({"include_qkv_bias": True}, ["k_proj", "q_proj", "v_proj"]),
        ({"include_bias": True}, ["attn_out", "ff_out", "ff_proj", "k_proj", "q_proj", "up_proj", "v_proj"]),
    ],
)
def test_biases_are_where_the_configuration_says(changes: dict[str, Any], biased: list[str]) -> None:
    names = [name for name in tiny_model(**changes).state_dict() if name.endswith(".bias")]
    expected_names = [f"model.transformer.blocks.{index}.{leaf}.bias" for index in range(2) for leaf in biased]
    expected_names += ["model.transformer.ff_out.bias"] if "ff_out" in biased else []
    assert sorted(names) == sorted(expected_names)


def test_configuration_fills_in_what_published_files_leave_out() -> None:
    config = LLaDAConfig(d_model=32, n_heads=4, vocab_size=7, mlp_ratio=3, attention_dropout=0.0, precision="amp_bf16")
    assert (config.n_kv_heads, config.mlp_hidden_size, config.embedding_size) == (4, 96, 7)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 32, 4)
    assert config.precision == "amp_bf16"
    assert not config.tie_word_embeddings
    assert tiny_config(multi_query_attention=True).n_kv_heads == 1
    assert tiny_config(multi_query_attention=False).n_kv_heads == 2


# The forward call


@pytest.mark.parametrize("argument", ["position_ids", "past_key_values", "token_type_ids", "atention_mask"])
def test_unknown_arguments_are_errors(argument: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=f"unsupported arguments .*{argument}"):
        model(input_ids=draw_ids(), **{argument: torch.zeros(1)})
    assert model(input_ids=draw_ids(), **{argument: None}).logits.shape == (2, LENGTH, 32)


def test_a_cache_is_an_error() -> None:
    with pytest.raises(ValueError, match="use_cache=True"):
        tiny_model()(input_ids=draw_ids(), use_cache=True)


def test_exactly_one_kind_of_input() -> None:
    model = tiny_model()
    embeds = model.get_input_embeddings()(draw_ids())
    assert torch.equal(model(inputs_embeds=embeds).logits, run(model, draw_ids()))
    for inputs in ({}, {"input_ids": draw_ids(), "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


def test_loss_is_the_mean_cross_entropy_of_labelled_positions() -> None:
    model = tiny_model(dtype=torch.float64)
    ids = draw_ids(mask_ratio=0.5)
    targets = draw_ids(mask_ratio=0.0, seed=3)
    labels = torch.where(ids == MASK, targets, -100)
    output = model(input_ids=ids, labels=labels)
    probabilities = expected(model, ids).exp()
    probabilities /= probabilities.sum(-1, keepdim=True)
    terms = [-math.log(float(probabilities[row, j, targets[row, j]])) for row, j in (ids == MASK).nonzero().tolist()]
    assert output.loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)
    loss, logits = model(input_ids=ids, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert model(input_ids=ids).loss is None


def test_loss_of_a_bfloat16_model_is_taken_in_float32() -> None:
    model = tiny_model().bfloat16()
    loss = model(input_ids=draw_ids(), labels=draw_ids(mask_ratio=0.0)).loss
    assert loss.dtype == torch.float32
    assert loss.requires_grad


@pytest.mark.parametrize("tied", [False, True])
def test_hidden_states_are_what_the_head_reads(tied: bool) -> None:
    model = tiny_model(weight_tying=tied)
    output = model(input_ids=draw_ids(), output_hidden_states=True)
    head = model.get_output_embeddings().weight
    torch.testing.assert_close(output.hidden_states[-1] @ head.T, output.logits)
    assert (head is model.get_input_embeddings().weight) == tied
    assert model(input_ids=draw_ids()).hidden_states is None


def test_fresh_weights_follow_the_configuration() -> None:
    torch.manual_seed(0)
    model = LLaDAModelLM(tiny_config(d_model=64, include_bias=True, init_std=0.5))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.5, rel=0.1), name
        else:
            assert bool((parameter == (1.0 if name.endswith("weight") else 0.0)).all()), name


def test_gradients_reach_every_weight() -> None:
    model = tiny_model(include_bias=True)
    model(input_ids=draw_ids(mask_ratio=0.0), labels=draw_ids(seed=1)).loss.backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in model.parameters())
