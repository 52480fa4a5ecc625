import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import dllmquant
from dllmquant.capture import capture_block_call
from dllmquant.decoding import BlockDiffusionSamplerConfig
from dllmquant.generation import generate_tokens
from dllmquant.models import LLaDA2MoeConfig, LLaDA2MoeModelLM, registered_adapters
from dllmquant.nn.sdpa import capture_attention
from tests.models.published import LLADA2_MINI, llada2_shapes
from tests.models.test_llada_modeling import draw_ids, padding, run
from tests.models.toys import MASK, PAD, tiny_llada2, tiny_llada2_config
from tests.oracles import llada2_reference as oracle
from tests.tiny import tiny_llada2 as tiny_generator
from tests.tiny import tiny_tokenizer

LENGTH = 11
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-expert": {"num_experts_per_tok": 1, "routed_scaling_factor": 1.5},
    "one-group": {"n_group": 1, "topk_group": 1, "num_experts": 5},
    "all-groups": {"topk_group": 4},
    "two-shared-two-dense": {"num_shared_experts": 2, "first_k_dense_replace": 2},
    "head-size-from-width": {"head_dim": None, "num_key_value_heads": None},
    "whole-rotation": {"partial_rotary_factor": 1.0, "num_key_value_heads": 1, "rope_theta": 600000.0},
    "eps": {"rms_norm_eps": 1e-3, "block_length": 1},
    "one-token-block": {"block_length": 64},
}


def architecture(config: LLaDA2MoeConfig) -> oracle.Architecture:
    return oracle.Architecture(
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rotated=round(config.head_dim * config.partial_rotary_factor),
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        dense_layers=config.first_k_dense_replace,
        n_experts=config.num_experts,
        n_groups=config.n_group,
        kept_groups=config.topk_group,
        chosen=config.num_experts_per_tok,
        scaling=config.routed_scaling_factor,
        block_length=config.block_length,
    )


def expected(
    model: LLaDA2MoeModelLM,
    ids: Tensor,
    keep: Tensor | None = None,
    visible: NDArray[np.bool_] | None = None,
    routing: oracle.Routing | None = None,
) -> Tensor:
    """The oracle's logits for every row of a batch; `visible` [length, length] instead of the block-causal mask."""
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    arch = architecture(model.config)
    rows = []
    for index, row in enumerate(ids.tolist()):
        real = [True] * len(row) if keep is None else keep[index].tolist()
        seen = oracle.block_causal(real, arch.block_length) if visible is None else visible
        rows.append(oracle.logits(weights, row, arch, seen, routing))
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_reference(variant: str, mask_ratio: float, pad: str) -> None:
    model = tiny_llada2(dtype=torch.float64, **VARIANTS[variant])
    ids, keep, routing = draw_ids(mask_ratio=mask_ratio), padding(pad), oracle.Routing()
    if keep is not None:
        ids[~keep] = PAD
    reference = expected(model, ids, keep, routing=routing)
    assert min(routing.margins) > 1e-5, "another seed: a choice of experts is too close to tell"
    assert routing.chosen != routing.unbiased
    shown = slice(None) if keep is None else keep
    # The rotary tables are float32 by design; everything else is float64.
    torch.testing.assert_close(run(model, ids, keep)[shown], reference[shown], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_theta", 150.0),
        ("rms_norm_eps", 1e-3),
        ("partial_rotary_factor", 1.0),
        ("routed_scaling_factor", 1.0),
        ("num_experts_per_tok", 2),
        ("topk_group", 1),
        ("n_group", 3),
        ("block_length", 5),
    ],
)
def test_the_tolerance_tells_architectures_apart(name: str, value: Any) -> None:
    reference = expected(tiny_llada2(dtype=torch.float64), draw_ids())
    assert 0.02 < float(reference.std()) < 30
    changed = tiny_llada2(dtype=torch.float64, **{name: value})
    assert float((run(changed, draw_ids()) - reference).abs().max()) > 1e-3


@pytest.mark.parametrize("tensor", ["mlp.gate.expert_bias", "mlp.shared_experts.down_proj.weight"])
def test_biases_and_shared_experts_count(tensor: str) -> None:
    model = tiny_llada2(dtype=torch.float64)
    before = run(model, draw_ids())
    model.state_dict()[f"model.layers.1.{tensor}"].zero_()
    assert float((run(model, draw_ids()) - before).abs().max()) > 1e-3


def test_float32_equals_the_reference() -> None:
    model, ids, routing = tiny_llada2(dtype=torch.float64), draw_ids(), oracle.Routing()
    reference = expected(model, ids, routing=routing)
    assert min(routing.margins) > 1e-4
    torch.testing.assert_close(run(model.float(), ids), reference.float(), rtol=1e-3, atol=1e-3)


# Who sees whom


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_four_dimensional_mask_is_used_as_given(rows: int, heads: int) -> None:
    model, ids = tiny_llada2(dtype=torch.float64), draw_ids()
    generator = torch.Generator().manual_seed(5)
    visible = (torch.rand(LENGTH, LENGTH, generator=generator) > 0.4) | torch.eye(LENGTH, dtype=torch.bool)
    given = visible.expand(rows, heads, LENGTH, LENGTH)
    reference = expected(model, ids, visible=visible.numpy())
    torch.testing.assert_close(run(model, ids, given), reference, rtol=1e-5, atol=1e-5)
    assert float((run(model, ids) - reference).abs().max()) > 1e-3


def test_masks_of_other_shapes_and_types_are_errors() -> None:
    model, ids = tiny_llada2(), draw_ids()
    for mask in (torch.ones(2, 5), torch.ones(2, LENGTH, LENGTH), torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool)):
        with pytest.raises(ValueError, match="attention_mask: shape"):
            model(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match="4-D masks must be bool"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, LENGTH, LENGTH))


def test_tokens_see_their_own_block_and_earlier_ones() -> None:
    model, ids = tiny_llada2(dtype=torch.float64), draw_ids(batch=1)
    before = run(model, ids)
    for changed in range(LENGTH):
        other = ids.clone()
        other[0, changed] = 1 + ids[0, changed] % (MASK - 1)
        difference = (run(model, other) - before).abs().amax(-1)[0]
        seen_from = changed // 4 * 4
        assert bool((difference[:seen_from] < 1e-12).all())
        assert bool((difference[seen_from:] > 1e-9).all()), changed


def test_a_canvas_may_be_cut_after_any_block() -> None:
    """What the published sampler relies on: it runs the blocks up to the one it decodes."""
    model, ids = tiny_llada2(dtype=torch.float64), draw_ids()
    whole = run(model, ids)
    for end in (4, 8):
        torch.testing.assert_close(run(model, ids[:, :end]), whole[:, :end], rtol=0, atol=1e-12)


def test_finished_blocks_can_be_kept() -> None:
    """The logits of two blocks shown one after the other, in rows of different beginnings, are those of all at once."""
    model, ids, keep = tiny_llada2(dtype=torch.float64), draw_ids(), padding("left")
    assert keep is not None
    whole, step = run(model, ids, keep), model.open_cache(keep)
    rows, first = torch.arange(2), torch.tensor([[0], [4]])
    for begin in (0, 4):
        columns = (first + begin + torch.arange(4)).clamp(max=LENGTH - 1)
        logits = step(rows, columns, ids.gather(1, columns), 4)
        torch.testing.assert_close(logits, whole[rows[:, None], columns], rtol=0, atol=1e-12)


def test_an_all_padding_row_is_finite_and_leaves_the_others_alone() -> None:
    model, ids = tiny_llada2(), draw_ids(batch=2)
    keep = torch.tensor([[True], [False]]).expand(2, LENGTH)
    logits = run(model, ids, keep)
    assert bool(logits.isfinite().all())
    torch.testing.assert_close(logits[0], run(model, ids[:1])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
def test_every_block_calls_attention_once_and_can_be_intercepted(padded: bool) -> None:
    model, ids, keep = tiny_llada2(), draw_ids(), padding("left") if padded else None

    def forward() -> None:
        model(input_ids=ids, attention_mask=keep)

    for block in registered_adapters()["llada2_moe"].block_list(model):
        call = capture_block_call(model, [block], forward)
        seen = capture_attention(block, lambda block=block, call=call: call.run(block))  # type: ignore[misc]
        assert seen.query.shape == seen.key.shape == seen.value.shape == (2, 4, LENGTH, 8)
        assert torch.equal(seen.value[:, 0::2], seen.value[:, 1::2])  # two query heads share each value head
        assert seen.scale == pytest.approx(8**-0.5)
        assert seen.mask is not None


# Configuration


def test_defaults_are_the_published_sizes() -> None:
    config = LLaDA2MoeConfig()
    keys = [key for key in LLADA2_MINI if key in config.to_dict() and key not in ("architectures", "dtype")]
    assert len(keys) > 15
    for key in keys:
        assert getattr(config, key) == LLADA2_MINI[key], key
    assert (config.mask_token_id, config.eos_token_id, config.block_length) == (156895, 156892, 32)
    assert (config.rotated_width, config.head_dim) == (64, 128)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("use_qkv_bias", True),
        ("use_bias", True),
        ("use_qk_norm", False),
        ("use_sliding_window", True),
        ("norm_head", True),
        ("score_function", "softmax"),
        ("norm_topk_prob", False),
        ("moe_router_enable_expert_bias", False),
        ("router_dtype", "bf16"),
        ("tie_word_embeddings", True),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 7.0, "factor": 2.0}),
    ],
)
def test_unsupported_variants_are_errors(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"LLaDA2 config: {key}=.* is not supported; valid: "):
        tiny_llada2_config(**{key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0, "head_dim": None}, "num_key_value_heads=2 must divide num_attention_heads=0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must divide"),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4 rotates 3 of head_dim=8; valid: an even"),
        ({"partial_rotary_factor": 0.0}, "rotates 0 of head_dim=8"),
        ({"partial_rotary_factor": 1.5}, "rotates 12 of head_dim=8"),
        ({"block_length": 0}, "block_length=0 is not supported"),
        ({"first_k_dense_replace": 0}, "first_k_dense_replace=0 is not supported; valid: at least 1, less than num_h"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace=3 is not supported"),
        ({"n_group": 5}, "n_group=5 must divide num_experts=12"),
        ({"n_group": 0}, "n_group=0 must divide"),
        ({"n_group": 12}, "n_group=12 must divide num_experts=12 into groups of at least two"),
        ({"topk_group": 5}, "topk_group=5 is not supported; valid: 1 to n_group=4"),
        ({"topk_group": 0}, "topk_group=0 is not supported"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7 is not supported; valid: 1 to 6, the experts of 2 groups"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 is not supported"),
        ({"num_shared_experts": 0}, "num_shared_experts=0 is not supported; valid: at least 1"),
        ({"num_shared_experts": None}, "num_shared_experts=None is not supported"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_llada2_config(**changes)


def test_configuration_round_trip(tmp_path: Path) -> None:
    """With keys that the published configurations have and the architecture does not need."""
    unused = {"rotary_dim": 4, "router_dtype": "fp32", "sliding_window": 4096, "max_window_layers": 28}
    config = tiny_llada2_config(rope_theta=77.0, sampler_defaults={"steps": 4}, embedding_dropout=0.0, **unused)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LLaDA2MoeConfig
    for key, value in config.to_dict().items():
        if key not in ("transformers_version", "_name_or_path"):
            assert loaded.to_dict()[key] == value, key


# The forward call


def test_unknown_arguments_caches_and_wrong_inputs_are_errors() -> None:
    model, ids = tiny_llada2(), draw_ids()
    for argument in ("position_ids", "past_key_values", "labels"):
        with pytest.raises(ValueError, match=rf"LLaDA2MoeModelLM forward: unsupported arguments \['{argument}'\]"):
            model(input_ids=ids, **{argument: torch.zeros(1)})
    with pytest.raises(ValueError, match="use_cache=True"):
        model(input_ids=ids, use_cache=True)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(run(model, ids), model(inputs_embeds=embeds).logits)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


def test_hidden_states_tuples_and_embeddings() -> None:
    model, ids = tiny_llada2(), draw_ids()
    output = model(input_ids=ids, output_hidden_states=True)
    assert torch.equal(model.lm_head(output.hidden_states[0]), output.logits)
    assert torch.equal(model(input_ids=ids, return_dict=False)[0], output.logits)
    assert model.get_input_embeddings() is model.model.word_embeddings
    assert model.get_output_embeddings() is model.lm_head
    other = nn.Embedding(32, 16)
    model.set_input_embeddings(other)
    assert model.model.word_embeddings is other


def test_fresh_models_are_initialised() -> None:
    torch.manual_seed(0)
    model = LLaDA2MoeModelLM(tiny_llada2_config(hidden_size=64, moe_intermediate_size=64, initializer_range=0.05))
    for name, tensor in model.state_dict().items():
        if name.endswith("expert_bias"):
            assert not tensor.any()
        elif "norm" in name:
            assert bool((tensor == 1).all())
        else:
            assert tensor.std().item() == pytest.approx(0.05, rel=0.1), name


# Loading

SMALL = LLADA2_MINI | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "head_dim": 8,
    "vocab_size": 32,
    "pad_token_id": PAD,
    "eos_token_id": PAD,
    "mask_token_id": MASK,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
LOADERS = [AutoModel, AutoModelForCausalLM, LLaDA2MoeModelLM]
BIAS = "model.layers.1.mlp.gate.expert_bias"
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"


def published_weights() -> dict[str, Tensor]:
    """bfloat16, but the expert biases, which may be float32."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in llada2_shapes(SMALL).items()}
    return {name: tensor if "bias" in name else tensor.bfloat16() for name, tensor in weights.items()}


def write_checkpoint(path: Path, weights: dict[str, Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(SMALL))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("loader", LOADERS)
def test_published_layout_loads_without_remote_code(loader: Any, tmp_path: Path) -> None:
    weights = published_weights()
    loaded = loader.from_pretrained(write_checkpoint(tmp_path / "in", weights))
    assert type(loaded) is LLaDA2MoeModelLM
    assert not loaded.training
    state = loaded.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {name: t.dtype for name, t in weights.items()}
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert {name for name, _ in loaded.named_buffers()} == {BIAS}
    loaded.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_identical(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_llada2(dtype=dtype, routed_scaling_factor=1.5, block_length=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is LLaDA2MoeModelLM
    assert run(loaded, draw_ids()).dtype == dtype
    assert torch.equal(run(loaded, draw_ids()), run(model, draw_ids()))


@pytest.mark.parametrize("name", [BIAS, DOWN, "model.layers.1.mlp.gate.weight", "lm_head.weight"])
def test_missing_weights_are_an_error(name: str, tmp_path: Path) -> None:
    weights = published_weights()
    del weights[name]
    with pytest.raises(ValueError, match=f"do not fit LLaDA2MoeModelLM .*; missing: {name}$"):
        AutoModel.from_pretrained(write_checkpoint(tmp_path, weights))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.4.up_proj.weight", "model.layers.0.attention.dense.bias"])
def test_unexpected_weights_are_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"; unexpected: {name}$"):
        AutoModel.from_pretrained(write_checkpoint(tmp_path, published_weights() | {name: torch.zeros(16)}))


def test_weights_of_another_shape_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"; of another shape: {DOWN} \(16, 9\) \(valid: \(16, 8\)\)$"):
        AutoModel.from_pretrained(write_checkpoint(tmp_path, published_weights() | {DOWN: torch.zeros(16, 9)}))


# Generation

PROMPTS = [" tom is in", "q: anna has 3 apples. anna buys 4 more. how many remain? a:", " so"]


def published_decode(
    model: LLaDA2MoeModelLM,
    prompt: list[int],
    *,
    mask_id: int,
    gen_length: int,
    block: int,
    steps: int,
    threshold: float,
) -> list[int]:
    """The published sampling loop at temperature 0 for one prompt, slowly: the generated tokens, past the EOS too.

    Blocks are counted from the beginning of the prompt, and only those up to the current one are run. The package's
    rules: the mask token is no candidate, and the last block ends with the generation.
    """
    ids = prompt + [mask_id] * gen_length
    blocks = -(-len(ids) // block)
    shares = [block // steps + (step < block % steps) for step in range(steps)]
    for current in range(len(prompt) // block, blocks):
        start, end = current * block, (current + 1) * block
        for share in shares:
            masked = [position for position in range(start, min(end, len(ids))) if ids[position] == mask_id]
            if not masked:
                break
            logits = run(model, torch.tensor([ids[:end]]))[0]
            logits[:, mask_id] = -torch.inf
            confidence, candidates = logits.softmax(-1).max(-1)
            ranked = sorted(masked, key=lambda position: -float(confidence[position]))
            sure = [position for position in masked if confidence[position] > threshold]
            for position in sure if len(sure) >= share else ranked[:share]:
                ids[position] = int(candidates[position])
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def generator() -> LLaDA2MoeModelLM:
    """A random float64 model whose attention is sharp, so that prompts matter."""
    return tiny_generator(initializer_range=0.5, rope_theta=1000.0).double()


def until_eos(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("steps", "threshold"), [(4, 1.0), (4, 0.2), (2, 0.95)])
def test_tokens_equal_the_published_algorithm(
    generator: LLaDA2MoeModelLM, prompt: str, steps: int, threshold: float
) -> None:
    tokenizer = tiny_tokenizer()
    mask_id, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    assert mask_id is not None
    settings: dict[str, Any] = {"gen_length": 10, "steps": steps, "threshold": threshold}
    reference = published_decode(
        generator, tokenizer(prompt).input_ids, mask_id=mask_id, block=generator.config.block_length, **settings
    )
    found = generate_tokens(generator, tokenizer, [prompt], **settings).tokens[0].tolist()
    assert until_eos(found, eos) == until_eos(reference, eos)


def test_batching_does_not_change_the_result(generator: LLaDA2MoeModelLM) -> None:
    tokenizer = tiny_tokenizer()
    together = dllmquant.generate(generator, tokenizer, PROMPTS)
    assert len(set(together)) == len(PROMPTS)
    assert [dllmquant.generate(generator, tokenizer, [prompt])[0] for prompt in PROMPTS] == together


def test_the_familys_sampler_is_the_published_one() -> None:
    sampler = registered_adapters()["llada2_moe"].sampler
    assert isinstance(sampler, BlockDiffusionSamplerConfig)
    assert (sampler.block_length, sampler.unit_steps, sampler.threshold, sampler.temperature) == (32, 32, 0.95, 0.0)
