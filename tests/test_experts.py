"""Mixture models: statistics follow the tokens to the experts that read them, and experts no token reaches are said."""

import copy
import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from dllmquant import DLLMQuantizer, Recipe
from dllmquant.calibration import CalibrationStates, builtin_prompts, collect_states
from dllmquant.calibration.experts import tokens_per_expert
from dllmquant.capture import BlockCall, inputs_of
from dllmquant.core.gptq import GPTQResult, gptq
from dllmquant.core.grid import Clip, Grid
from dllmquant.core.qronos import qronos
from dllmquant.core.rtn import rtn
from dllmquant.lab.inspection import describe_checkpoint
from dllmquant.models import ModelAdapter, adapters, register_adapter, registered_adapters
from dllmquant.models.experts import RoutedExperts, is_expert, mixtures, routed_to
from dllmquant.models.layers import RMSNorm
from dllmquant.nn.linear import QuantLinear
from dllmquant.plan import make_plan
from dllmquant.preparation import prepare
from dllmquant.preparation.inputs import magnitudes
from dllmquant.preparation.routes import holding_routes, recording_routes
from dllmquant.transforms.fold import assert_same_function, probe_logits
from dllmquant.transforms.quarot import rotate_residual
from tests.tiny import tiny_llada, tiny_recipe, tiny_tokenizer

WIDTH, HIDDEN, EXPERTS, TOP = 16, 16, 5, 2


class MixtureConfig(PretrainedConfig):
    model_type = "toy_mixture"

    def __init__(self, vocab_size: int = 64, mask_id: int = 3, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.mask_id = mask_id
        super().__init__(**kwargs)


class Feed(nn.Module):
    """A gated layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return out


class Mixture(nn.Module):
    """Two of five experts per token, beside one that reads all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = RoutedExperts(Feed() for _ in range(EXPERTS))
        self.shared = Feed()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores, chosen = self.router(tokens).float().softmax(-1).topk(TOP)
        return self.experts(tokens, chosen, scores).view(x.shape) + self.shared(x)


class Layer(nn.Module):
    """Mixes tokens by attention without projections of its own but one, then feeds them forward."""

    def __init__(self, feed: nn.Module) -> None:
        super().__init__()
        self.norm1 = RMSNorm(WIDTH, 1e-6)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = RMSNorm(WIDTH, 1e-6)
        self.mlp = feed

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        read = self.norm1(x)
        value = self.value(read)
        q, k, v = (part[:, None] for part in (value.flip(-1), value, value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
        x = x + self.out(mixed[:, 0])
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ToyMixture(PreTrainedModel):
    """One dense block, then two mixture blocks."""

    config_class = MixtureConfig

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, WIDTH)
        self.layers = nn.ModuleList([Layer(Feed()), Layer(Mixture()), Layer(Mixture())])
        self.norm = RMSNorm(WIDTH, 1e-6)
        self.head = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> MaskedLMOutput:
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask.bool())
        return MaskedLMOutput(logits=self.head(self.norm(x)))


ADAPTER = ModelAdapter(
    model_type="toy_mixture",
    blocks="layers",
    linear_groups=(
        ("value",),
        ("out",),
        ("mlp.gate", "mlp.up"),
        ("mlp.down",),
        ("mlp.experts.*.gate", "mlp.experts.*.up"),
        ("mlp.experts.*.down",),
        ("mlp.shared.gate", "mlp.shared.up"),
        ("mlp.shared.down",),
    ),
    kept=("mlp.router",),
    embedding="tokens",
    head="head",
    mask_token_id="mask_id",
    site_names=(("ff_out", "mlp.down"), ("ff_out", "mlp.experts.*.down"), ("ff_out", "mlp.shared.down")),
    scale_pairs=(
        ("norm1", ("value",)),
        (
            "norm2",
            (
                "mlp.gate",
                "mlp.up",
                "mlp.router",
                "mlp.experts.*.gate",
                "mlp.experts.*.up",
                "mlp.shared.gate",
                "mlp.shared.up",
            ),
        ),
        ("mlp.up", ("mlp.down",)),
        ("mlp.experts.*.up", ("mlp.experts.*.down",)),
    ),
    residual_outputs=("out", "mlp.down", "mlp.experts.*.down", "mlp.shared.down"),
    final_norm="norm",
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_ADAPTERS", registered_adapters())
    register_adapter(ADAPTER)
    AutoConfig.register("toy_mixture", MixtureConfig, exist_ok=True)
    AutoModel.register(MixtureConfig, ToyMixture, exist_ok=True)


def toy(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A toy with weights far from their initial values; typed loosely for its modules' sake."""
    tokenizer = tiny_tokenizer()
    model = ToyMixture(
        MixtureConfig(
            vocab_size=len(tokenizer),
            mask_id=tokenizer.mask_token_id,
            sampler_defaults={"steps": 8, "gen_length": 8, "block_length": 4},
        )
    )
    nn.Module.to(model, dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.5 * noise)
    return model.eval()


def recipe(**changes: Any) -> dict[str, Any]:
    settings = tiny_recipe(activations=None, **changes)
    settings["calibration"] = {"num_states": 16, "num_prompts": 4, "min_expert_tokens": 4} | settings["calibration"]
    return settings


def quantized(model: PreTrainedModel, **changes: Any) -> DLLMQuantizer:
    quantizer = DLLMQuantizer(recipe(**changes))
    quantizer.quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    return quantizer


def seen_by(model: PreTrainedModel, name: str, states: CalibrationStates) -> list[Tensor]:
    """Inputs, and for experts the tokens chosen, of one module in a forward pass of the whole model."""
    seen: list[Any] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args))
    with torch.no_grad():
        model(states.batch.ids, attention_mask=states.batch.attention_mask)
    handle.remove()
    return list(seen[0]) if seen else []


# The module


def test_experts_add_up_what_each_token_chose() -> None:
    torch.manual_seed(0)
    experts = RoutedExperts(Feed() for _ in range(EXPERTS)).double()
    x = torch.randn(11, WIDTH, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(EXPERTS - 1)[:TOP] for _ in range(11)])  # nobody chooses the last
    weights = torch.rand(11, TOP, dtype=torch.float64)
    expected = torch.stack(
        [
            sum(w * experts[int(e)](row) for e, w in zip(c, s, strict=True))
            for row, c, s in zip(x, chosen, weights, strict=True)
        ]
    )
    assert torch.allclose(experts(x, chosen, weights), expected, atol=1e-12)
    assert routed_to(chosen, EXPERTS - 1).tolist() == []
    assert routed_to(chosen, 0).tolist() == [row for row in range(11) if 0 in chosen[row]]


def test_the_last_expert_is_not_called_without_tokens() -> None:
    experts = RoutedExperts([nn.Linear(2, 2), nn.Linear(2, 2)])
    experts[1].register_forward_hook(lambda *_: pytest.fail("called"))
    experts(torch.ones(3, 2), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))


def test_sums_are_wide_and_results_narrow() -> None:
    experts = RoutedExperts([nn.Identity()])
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    out = experts(x, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[1.001]]))
    assert out.dtype == torch.bfloat16
    assert experts(x.float(), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[1.001]])).item() == pytest.approx(
        1.001
    )


# Capturing


def test_token_weights_follow_the_tokens() -> None:
    model = toy(dtype=torch.float64)
    block = model.layers[1]
    hidden = torch.randn(3, 6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    call = BlockCall(hidden, (torch.ones(3, 6, dtype=torch.bool),), {})
    weights = torch.rand(3, 6, generator=torch.Generator().manual_seed(2))
    weights[1, :3] = 0
    linears = [expert.gate for expert in block.mlp.experts] + [block.mlp.shared.down]
    seen = inputs_of(block, linears, call, weights)
    args: list[Any] = []
    handle = block.mlp.experts.register_forward_pre_hook(lambda _module, given: args.extend(given))
    with torch.no_grad():
        block(hidden, *call.args)
    handle.remove()
    x, chosen, _ = args
    assert torch.equal(seen.chosen["mlp.experts"], chosen)
    for index in range(EXPERTS):
        rows = [row for row in range(18) if index in chosen[row].tolist()]
        assert torch.equal(seen.tokens[index], x[rows])
        assert torch.equal(seen.weights[index], weights.flatten()[rows])
    assert seen.tokens[-1].shape == (3, 6, HIDDEN)
    assert torch.equal(seen.weights[-1], weights)


def test_experts_can_be_made_to_read_given_tokens() -> None:
    block = toy().layers[1]
    call = BlockCall(torch.randn(1, 4, WIDTH), (torch.ones(1, 4, dtype=torch.bool),), {})
    chosen = torch.tensor([[4, 0], [4, 0], [4, 0], [1, 0]])
    seen = inputs_of(block, [e.up for e in block.mlp.experts], call, torch.ones(1, 4), chosen={"mlp.experts": chosen})
    assert [len(x) for x in seen.tokens] == [4, 1, 0, 0, 3]
    assert all(x.shape[1] == WIDTH for x in seen.tokens)


def test_a_layer_that_is_never_called_is_an_error() -> None:
    block = toy().layers[0]
    block.spare = nn.Linear(WIDTH, WIDTH)
    call = BlockCall(torch.randn(1, 4, WIDTH), (torch.ones(1, 4, dtype=torch.bool),), {})
    with pytest.raises(ValueError, match="without calling a layer its adapter lists"):
        inputs_of(block, [block.spare], call, torch.ones(1, 4))


def test_a_layer_that_reads_something_else_than_tokens_is_an_error() -> None:
    block = toy().layers[0]
    call = BlockCall(torch.randn(1, 4, WIDTH), (torch.ones(1, 4, dtype=torch.bool),), {})
    with pytest.raises(ValueError, match=r"reads \(1, 4, 16\) where 3 tokens were given"):
        inputs_of(block, [block.out], call, torch.ones(1, 3))


# Planning


def test_groups_of_a_dense_and_of_a_mixture_block() -> None:
    model = toy()
    plan = make_plan(model, ADAPTER, Recipe.load(recipe()))
    assert [[len(stage) for stage in stages] for stages in plan.stages] == [[1, 1, 1, 1]] + [[1, 1, 5, 5, 1, 1]] * 2
    assert plan.stages[1][2][3] == ("layers.1.mlp.experts.3.gate", "layers.1.mlp.experts.3.up")
    assert len(plan.modules) == 5 + 2 * (2 + 15 + 3)
    assert not any("router" in name for name in plan.modules)
    sites = Recipe.load(recipe(transforms=[{"kind": "hadamard", "sites": ["ff_out"]}]))
    assert len(make_plan(model, ADAPTER, sites).input_transforms) == 1 + 2 * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": ()}, r"'layers\.1\.mlp\.router' is in no group; list it, or name it in `kept`"),
        ({"kept": ("mlp.router", "mlp.gating")}, "kept: no module 'mlp.gating'"),
        ({"linear_groups": ADAPTER.linear_groups[1:]}, r"'layers\.0\.value' is in no group"),
        ({"linear_groups": (("value", "values"), *ADAPTER.linear_groups[1:])}, "has 'value' but no 'values'"),
        ({"linear_groups": (*ADAPTER.linear_groups, ("mlp.expert.*.up",))}, r"no module 'mlp\.expert\.\*\.up' in any"),
        ({"linear_groups": (*ADAPTER.linear_groups, ("mlp.experts.*.u",))}, r"no module 'mlp\.experts\.\*\.u' in any"),
        ({"residual_outputs": ("mlp.experts.*.downs",)}, r"residual_outputs: no module 'mlp\.experts\.\*\.downs'"),
    ],
)
def test_adapters_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    settings = {name: getattr(ADAPTER, name) for name in ADAPTER.__dataclass_fields__} | {"site_names": ()} | changes
    with pytest.raises(ValueError, match=message):
        ModelAdapter(**settings).validate(toy())


# Solving


def mean_outer(rows: Tensor, others: Tensor, weights: Tensor) -> Tensor:
    """Σ w a bᵀ / Σ w, token by token in float64."""
    total = torch.zeros(rows.shape[1], others.shape[1], dtype=torch.float64)
    for a, b, w in zip(rows.double(), others.double(), weights.double(), strict=True):
        total += w * torch.outer(a, b)
    return (total / weights.double().sum()).float()


@pytest.mark.parametrize("budget", [4 << 30, 1])
@pytest.mark.parametrize("solver", ["gptq", "qronos"])
def test_experts_are_solved_on_their_own_tokens(solver: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer of an expert in the second mixture, from whole-model passes and sums token by token."""
    monkeypatch.setattr("dllmquant.pipeline._STATISTICS_BYTES", budget)
    model = toy()
    full = copy.deepcopy(model)
    quantizer = quantized(model, weights={"group_size": 16, "solver": solver, "bits": 3})
    states, settings = quantizer.states, quantizer.recipe.weights
    assert states is not None
    grid = Grid(settings.bits, settings.group_size, settings.symmetric)
    checked = 0
    for index in range(EXPERTS):
        name = f"layers.2.mlp.experts.{index}"
        report = {r.name: r for r in quantizer.reports}[f"{name}.gate"]
        x, chosen, _ = seen_by(model, "layers.2.mlp.experts", states)
        rows = [row for row in range(len(x)) if index in chosen[row].tolist() and states.weights.flatten()[row] > 0]
        assert report.tokens == len(rows)
        if report.fallback is not None:
            continue
        weights = states.weights.flatten()[rows]
        moments = [mean_outer(x[rows], x[rows], weights)]
        if solver == "qronos":
            source = seen_by(full, "layers.2.mlp.experts", states)[0]
            moments.append(mean_outer(source[rows] - x[rows], x[rows], weights))
        solve: Callable[..., GPTQResult] = gptq if solver == "gptq" else qronos
        options = {"act_order": settings.act_order, "damping": settings.damping, "clip": settings.clip}
        expected = solve(full.get_submodule(f"{name}.gate").weight.detach(), *moments, grid, **options).weight
        layer = model.get_submodule(f"{name}.gate")
        assert isinstance(layer, QuantLinear)
        got = layer.quantized_weight()
        assert (got.codes == expected.codes).float().mean() > 0.99  # sums are taken in another order
        assert torch.allclose(got.scale, expected.scale, rtol=1e-2)
        checked += 1
    assert checked >= 3


def test_a_starved_expert_is_rounded_to_nearest_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    with torch.no_grad():  # nothing is routed to the last expert: its score is the least for tokens of any sign
        for layer in model.layers[1:]:
            layer.norm2.weight.abs_()
            layer.mlp.router.weight[-1] = 0
            layer.mlp.router.weight[0] = layer.mlp.router.weight[1].abs() * 4
            layer.mlp.router.weight[1] = -layer.mlp.router.weight[0]
    original = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING):
        quantizer = quantized(model, calibration={"min_expert_tokens": 10**6, "max_growth": 1})
    reports = {report.name: report for report in quantizer.reports}
    counts = quantizer.expert_tokens
    assert set(counts) == {"layers.1.mlp.experts", "layers.2.mlp.experts"}
    for name, report in reports.items():
        assert (report.fallback is not None) == ("experts" in name)
        if report.fallback is not None:
            assert f"{report.tokens} of 1000000 tokens" in report.fallback
            assert report.loss is None
    weights = quantizer.recipe.weights
    grid = Grid(weights.bits, weights.group_size, weights.symmetric)
    name = "layers.2.mlp.experts.1.down"
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    clip: Clip = "mse" if weights.clip == "mse" else "none"
    expected = rtn(original.get_submodule(name).weight.detach(), grid, clip=clip)
    assert torch.equal(layer.quantized_weight().codes, expected.codes)
    assert "; 10 read fewer than 1000000; calibration.num_prompts or" in caplog.text
    assert "30 layers of starved experts were rounded to nearest" in caplog.text


def test_more_states_are_drawn_while_experts_starve() -> None:
    few = quantized(toy(), calibration={"num_states": 4, "min_expert_tokens": 1, "max_growth": 1})
    assert few.states is not None
    lowest = min(min(counts) for counts in few.expert_tokens.values())
    more = quantized(toy(), calibration={"num_states": 4, "min_expert_tokens": lowest + 1, "max_growth": 4})
    assert more.states is not None
    assert len(few.states.batch) == 4
    assert len(more.states.batch) in (8, 16)
    assert min(min(counts) for counts in more.expert_tokens.values()) > lowest
    limited = quantized(toy(), calibration={"num_states": 4, "min_expert_tokens": 10**6, "max_growth": 3})
    assert limited.states is not None
    assert len(limited.states.batch) == 12
    # One recording, made here, however often states are drawn from it.
    once, often = few.states.cost, limited.states.cost
    assert once is not None
    assert often is not None
    assert once.counts() == often.counts()
    assert not often.cached


def test_clean_states_grow_as_far_as_prompts_go() -> None:
    clean = {"states": "clean", "num_states": 4, "min_expert_tokens": 10**6, "max_growth": 2}
    plain = {"kind": "uniform"}
    grown = quantized(toy(), calibration=clean, token_weights=plain)
    assert grown.states is not None
    assert len(grown.states.batch) == 8
    quantizer = DLLMQuantizer(recipe(calibration=clean, token_weights=plain))
    prompts = [(f"q: anna has {n} apples. how many remain? a:", f" {n}") for n in range(2, 7)]
    quantizer.quantize(toy(), tokenizer=tiny_tokenizer(), prompts=prompts, progress=False)
    assert quantizer.states is not None
    assert len(quantizer.states.batch) == 5


def test_counts_are_those_of_the_full_precision_model() -> None:
    model = toy()
    original = copy.deepcopy(model)
    quantizer = quantized(model)
    states = quantizer.states
    assert states is not None
    used = states.weights.flatten() > 0
    for name, counts in quantizer.expert_tokens.items():
        chosen = seen_by(original, name, states)[1][used]
        assert counts == [int((chosen == index).sum()) for index in range(EXPERTS)]
        assert sum(counts) == TOP * int(used.sum())
    assert quantizer.expert_tokens == tokens_per_expert(original, ADAPTER, states, batch_size=3)


def test_models_without_experts_have_no_counts() -> None:
    model = tiny_llada()
    assert mixtures(model) == {}
    assert quantized(model).expert_tokens == {}


def test_a_checkpoint_holds_the_counts_and_reloads(tmp_path: Path) -> None:
    model = toy()
    quantizer = quantized(model)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["expert_tokens"] == quantizer.expert_tokens
    described = describe_checkpoint(tmp_path, AutoConfig.from_pretrained(tmp_path))
    counts = sorted(count for layer in quantizer.expert_tokens.values() for count in layer)
    assert f"10 experts in 2 layers read {counts[0]} to {counts[-1]} calibration tokens each" in described
    reloaded = AutoModel.from_pretrained(tmp_path)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        one, other = (m(ids, attention_mask=torch.ones_like(ids)).logits for m in (model, reloaded))
    assert torch.equal(one, other)
    assert is_expert(reloaded.layers[1], reloaded.layers[1].mlp.experts[0].down)
    assert not is_expert(reloaded.layers[1], reloaded.layers[1].mlp.shared.down)


# Transforms


@pytest.mark.parametrize(
    "transforms",
    [
        [{"kind": "smoothquant"}],
        [{"kind": "awq"}],
        [{"kind": "awq", "objective": "layer"}],
        [{"kind": "quarot", "values": False}],
    ],
    ids=["smoothquant", "awq", "awq-layer", "quarot"],
)
def test_folded_transforms_reach_router_and_experts(transforms: list[dict[str, Any]]) -> None:
    model = toy(dtype=torch.float64)
    plain = DLLMQuantizer(recipe())
    settings = Recipe.load(recipe(transforms=transforms))
    plain.quantize(toy(), tokenizer=tiny_tokenizer(), progress=False)
    states = plain.states
    assert states is not None
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids, keep, mask_id = states.batch.ids, states.batch.attention_mask, ADAPTER.mask_id(model.config)
    before = probe_logits(ADAPTER.denoiser(model), ids, keep, mask_id)
    prepare(model, ADAPTER, make_plan(model, ADAPTER, settings), settings, states, progress=False)
    after = probe_logits(ADAPTER.denoiser(model), ids, keep, mask_id)
    assert_same_function(before, after, keep, transform="folded", tolerance=1e-10)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, original[name])}
    for index in (1, 2):
        assert {f"layers.{index}.mlp.router.weight", f"layers.{index}.mlp.experts.0.gate.weight"} <= changed


@pytest.mark.parametrize("kind", ["smoothquant", "awq"])
def test_scales_of_a_norm_that_experts_alone_read_come_from_all_tokens(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DiffusionGemma's, whose router has an input of its own."""
    model = toy()
    for layer in model.layers[1:]:
        del layer.mlp.shared
        layer.mlp.shared = nn.Identity()
    only = {"mlp.router", "mlp.shared.gate", "mlp.shared.up"}
    pairs = tuple(
        (producer, tuple(c for c in consumers if c not in only)) for producer, consumers in ADAPTER.scale_pairs
    )
    adapter = dataclasses.replace(
        ADAPTER,
        linear_groups=tuple(group for group in ADAPTER.linear_groups if "shared" not in group[0]),
        scale_pairs=pairs,
        site_names=(),
        residual_outputs=tuple(name for name in ADAPTER.residual_outputs if "shared" not in name),
    )
    register_adapter(adapter, replace=True)
    sizes: list[tuple[Tensor, Tensor]] = []

    def watched(block: nn.Module, reader: Any, calls: Any, weights: Any) -> Any:
        size = magnitudes(block, reader, calls, weights)
        assert size is not None
        if isinstance(reader, RoutedExperts):
            mlp = block.get_submodule("mlp")
            seen = [inputs_of(block, [mlp], call, w) for call, w in zip(calls, weights, strict=True)]
            rows = torch.cat([part.tokens[0][part.weights[0] > 0] for part in seen])
            sizes.append((size.absmax, rows.abs().amax(0)))
        return size

    monkeypatch.setattr("dllmquant.preparation.scaling.magnitudes", watched)
    quantizer = DLLMQuantizer(recipe(transforms=[{"kind": kind}]))
    plan, settings = make_plan(model, adapter, quantizer.recipe), quantizer.recipe
    assert settings.calibration is not None
    states = collect_states(
        model,
        tiny_tokenizer(),
        builtin_prompts(4, 0),
        settings.calibration,
        settings.token_weights,
        seed=0,
        progress=False,
    )
    with pytest.raises(ValueError, match="changes what the model computes"):  # the router reads the norm here
        prepare(model, adapter, plan, settings, states, progress=False)
    assert len(sizes) == 2
    for got, expected in sizes:
        assert torch.equal(got, expected)


def test_rotations_reach_every_reader_and_writer() -> None:
    model = toy(dtype=torch.float64)
    ids = torch.arange(4, 24).view(2, 10)
    keep = torch.ones_like(ids, dtype=torch.bool)
    before = probe_logits(ADAPTER.denoiser(model), ids, keep, 3)
    rotate_residual(model, ADAPTER, seed=1)
    assert_same_function(
        before, probe_logits(ADAPTER.denoiser(model), ids, keep, 3), keep, transform="R1", tolerance=1e-11
    )


@pytest.mark.parametrize("kind", ["hadamard", "duquant", "wush"])
def test_input_transforms_per_expert(kind: str) -> None:
    model = toy()
    settings: dict[str, Any] = {"kind": kind, "sites": ["ff_out"], "block_size": 16}
    quantized(model, transforms=[settings])
    for index in range(EXPERTS):
        layer = model.layers[2].mlp.experts[index].down
        assert layer.input_transform is not None


def test_bits_are_allocated_to_experts() -> None:
    model = toy()
    settings = recipe()
    settings["activations"] = {"bits": 4, "allocation": {"mean_bits": 5}}
    quantizer = DLLMQuantizer(settings)
    quantizer.quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    sites = {entry.site for entry in quantizer.allocation}
    assert "layers.1.mlp.experts.4.down" in sites
    assert len(sites) == 4 + 2 * (2 + 10 + 2)


def test_held_routes_count_with_the_weights_of_their_own_run() -> None:
    """Whatever the order inside the choice; an expert that the run would not choose takes the place's weight."""
    layer = RoutedExperts(nn.Identity() for _ in range(4))
    x = torch.ones(3, 1)
    first = torch.tensor([[0, 1], [2, 3], [1, 2]])
    with recording_routes(layer) as routes:
        layer(x, first, torch.full((3, 2), 0.5))
    seen: list[Any] = []
    layer.register_forward_hook(lambda _module, args, _output: seen.extend(args))
    weights = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.8, 0.2]])
    with holding_routes(layer, routes):
        layer(x, torch.tensor([[1, 0], [2, 3], [1, 0]]), weights)
    assert torch.equal(seen[1], first)
    assert torch.equal(seen[2], torch.tensor([[0.3, 0.7], [0.6, 0.4], [0.8, 0.2]]))


def test_a_starved_expert_keeps_to_the_mean_width() -> None:
    model = toy()
    mixed = {"group_size": 16, "bits": 4, "mixed": {"choices": [2, 3], "mean": 2.5}}
    quantizer = quantized(model, weights=mixed, calibration={"min_expert_tokens": 10**6, "max_growth": 1})
    assert all(report.bits <= 2.5 for report in quantizer.reports)
    assert any(report.fallback is not None for report in quantizer.reports)


def test_a_starved_expert_keeps_to_a_mean_below_two(tmp_path: Path) -> None:
    """One width for the whole layer: one bit, which a checkpoint can hold like any other."""
    model = toy()
    mixed = {"group_size": 8, "bits": 2, "mixed": {"choices": [1, 2], "mean": 1.5}}
    quantizer = quantized(model, weights=mixed, calibration={"min_expert_tokens": 10**6, "max_growth": 1})
    starved = [report for report in quantizer.reports if report.fallback is not None]
    assert {report.bits for report in starved} == {1}
    assert all(report.bits <= 1.5 for report in quantizer.reports)
    model.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    for report in starved:
        expected = rtn(toy().get_submodule(report.name).weight.detach(), Grid(1, 8, symmetric=False))
        assert torch.equal(reloaded.get_submodule(report.name).quantized_weight().dequantize(), expected.dequantize())


@pytest.mark.parametrize(
    "transforms", [[{"kind": "awq"}], [{"kind": "duquant", "block_size": 16}], [{"kind": "wush", "block_size": 16}]]
)
def test_transforms_pass_over_an_expert_that_no_token_reaches(transforms: list[dict[str, Any]]) -> None:
    model = toy()
    for layer in model.layers[1:]:
        biased = nn.Linear(WIDTH, EXPERTS)
        biased.weight.data = layer.mlp.router.weight.data
        biased.bias.data = torch.tensor([0.0] * (EXPERTS - 1) + [-1e4])
        layer.mlp.router = biased
    last = model.layers[2].mlp.experts[-1]
    down = last.down.weight.detach().clone()
    quantizer = quantized(model, transforms=transforms)
    assert all(counts[-1] == 0 < min(counts[:-1]) for counts in quantizer.expert_tokens.values())
    packed = model.layers[2].mlp.experts[-1].down
    assert packed.input_transform is None
    grid = Grid(4, 16, symmetric=False)
    assert torch.equal(packed.quantized_weight().codes, rtn(down, grid, clip="mse").codes)
    fallbacks = {report.name for report in quantizer.reports if report.fallback is not None}
    assert {name for name in fallbacks if name.startswith("layers.2")} == {
        f"layers.2.mlp.experts.4.{leaf}" for leaf in ("gate", "up", "down")
    }
