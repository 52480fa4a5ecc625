"""DiffusionGemma: transformers' own model, rearranged, run in one pass, quantized, saved, read back, generating."""

import copy
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaModel,
    DynamicCache,
    PreTrainedModel,
)
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

import dllmquant
from dllmquant import DLLMQuantizer, Recipe, RecipeError
from dllmquant.calibration import builtin_prompts, collect_states
from dllmquant.capture import first_calls, inputs_of
from dllmquant.core.grid import Grid
from dllmquant.core.hadamard import hadamard_factors
from dllmquant.export import FORMATS, ExportError, export_model
from dllmquant.generation import generate_from_ids, generate_tokens
from dllmquant.lab.agreement import record_agreement
from dllmquant.models import adapter_for
from dllmquant.models.diffusion_gemma.arrange import FUSED, arrange
from dllmquant.models.diffusion_gemma.joint import denoise, refine
from dllmquant.models.experts import RoutedExperts
from dllmquant.nn.linear import QuantLinear
from dllmquant.plan import make_plan
from dllmquant.preparation import prepare
from dllmquant.preparation.routes import holding_routes, recording_routes
from dllmquant.transforms.fold import assert_same_function, probe_logits
from tests.models.published import DIFFUSION_GEMMA_26B, diffusion_gemma_shapes, packed_size
from tests.models.test_end_to_end import PROMPTS, shrunk
from tests.tiny import tiny_diffusion_gemma, tiny_tokenizer

SIZE = 8  # of a canvas
THREE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps transformers' `generate` from importing torch's compiler, only to tell it that a step begins."""
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)


def tiny(**text: Any) -> Any:
    """A model in float64, whose experts transformers computes one by one: what it does in groups has no float64."""
    model = tiny_diffusion_gemma(text=text).double()
    model.set_experts_implementation("eager")
    return model


def states(length: int, *, padding: tuple[int, ...] = (0, 3, 9)) -> tuple[Tensor, Tensor]:
    """Random ids and their attention mask, left-padded."""
    ids = torch.randint(1, 140, (len(padding), length), generator=torch.Generator().manual_seed(length))
    keep = torch.arange(length) >= torch.tensor(padding)[:, None]
    return ids.masked_fill(~keep, 0), keep


@torch.no_grad()
def reference(model: Any, ids: Tensor, keep: Tensor, previous: Tensor | None, *, chunks: int = 1) -> Any:
    """What transformers computes: the encoder fills its cache, in several calls as in `generate`, the decoder reads."""
    filled, context, start = DynamicCache(config=model.config.text_config), ids.shape[1] - SIZE, 0
    # transformers calls the argument "cache" from 5.24 on.
    own = inspect.signature(model.forward).parameters
    cache = {"cache" if "cache" in own else "past_key_values": filled}
    for part in ids[:, :context].tensor_split(chunks, dim=1):
        end = start + part.shape[1]
        positions = torch.arange(start, end)[None]
        encoded = model.model.encoder(input_ids=part, attention_mask=keep[:, :end], position_ids=positions, **cache)
        start = end
    decoded = model(
        **cache,
        decoder_input_ids=ids[:, context:],
        decoder_attention_mask=keep,
        self_conditioning_logits=previous,
    )
    return decoded.logits, encoded.last_hidden_state


@pytest.mark.parametrize(
    ("noise", "window", "chunks"), [(0.0, 5, 1), (0.5, 3, 1), (1.0, 5, 2), (0.5, 3, 2), (0.3, 40, 1), (1.0, 40, 2)]
)
def test_joint_logits_equal_transformers(noise: float, window: int, chunks: int) -> None:
    """Both kinds of layers, windows shorter and longer than the context, left padding, the feedback of predictions."""
    model = tiny(sliding_window=window, **THREE)
    ids, keep = states(25)
    noisy = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < noise
    noisy[:, :-SIZE] = False
    ids[noisy] = torch.randint(147, ids.shape, generator=torch.Generator().manual_seed(2))[noisy]
    first, _ = reference(model, ids, keep, None, chunks=chunks)
    second, _ = reference(model, ids, keep, first, chunks=chunks)
    assert float((first - second).abs().max()) > 0.1
    canvas = slice(-SIZE, None)
    with torch.no_grad():
        torch.testing.assert_close(refine(model, ids, keep, None, canvas), first, rtol=0, atol=1e-5)
        torch.testing.assert_close(refine(model, ids, keep, first, canvas), second, rtol=0, atol=1e-5)
        torch.testing.assert_close(denoise(model, ids, keep.long())[:, canvas], second, rtol=0, atol=1e-5)


def test_context_logits_are_the_encoders_moved_to_what_they_predict() -> None:
    model = tiny(**THREE)
    ids, keep = states(21)
    _, hidden = reference(model, ids, keep, None)
    with torch.no_grad():
        expected = 30 * torch.tanh(model.lm_head(hidden) / 30)
        found = denoise(model, ids, keep)[:, :-SIZE]
    for row, padding in enumerate((0, 3, 9)):
        torch.testing.assert_close(found[row, padding + 1 :], expected[row, padding:-1].float(), rtol=0, atol=1e-5)
        torch.testing.assert_close(found[row, padding], expected[row, padding].float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [SIZE, 5])
def test_a_canvas_may_be_all_there_is(length: int) -> None:
    """Texts without context, or shorter than a canvas, have no encoder to compare with; they attend to themselves."""
    model = tiny()
    ids, keep = states(length, padding=(0, 2))
    with torch.no_grad():
        logits = denoise(model, ids, keep)
        alone = denoise(model, ids[1:, 2:], keep[1:, 2:])
    assert logits.shape == (2, length, 147)
    torch.testing.assert_close(logits[1:, 2:], alone, rtol=0, atol=1e-3)  # rotary angles are rounded where they stand
    assert bool(logits.isfinite().all())


def test_a_pass_looks_at_nothing_it_should_not() -> None:
    model = tiny()
    ids, keep = states(20, padding=(0,))

    def changed_by(position: int) -> list[int]:
        other = ids.clone()
        other[0, position] = (other[0, position] + 1) % 140
        with torch.no_grad():
            difference = (denoise(model, other, keep) - denoise(model, ids, keep)).abs().amax(-1)[0]
        return [int(place) for place in (difference > 1e-7).nonzero()]

    assert changed_by(15) == list(range(12, 20)), "canvas is not seen by context"
    assert changed_by(6) == [*range(7, 12), *range(12, 20)], "context is causal, and its logits predict the next token"


# Rearranging


def test_arranging_keeps_the_function() -> None:
    model, arranged = tiny(**THREE), tiny(**THREE)
    for _ in range(2):
        arrange(arranged)
    ids, keep = states(21)
    for previous in (None, reference(model, ids, keep, None)[0]):
        for expected, found in zip(
            reference(model, ids, keep, previous, chunks=2),
            reference(arranged, ids, keep, previous, chunks=2),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(denoise(arranged, ids, keep), denoise(model, ids, keep), rtol=0, atol=1e-5)


def test_arranging_leaves_each_weight_once() -> None:
    model, arranged = tiny(), tiny()
    arrange(arranged)
    assert all(isinstance(layer.experts, RoutedExperts) for layer in arranged.model.decoder.layers)
    assert not list(arranged.model.encoder.language_model.layers.parameters())
    encoder = [name for name in arranged.state_dict() if ".language_model." in name]
    assert encoder == [
        "model.encoder.language_model.embed_tokens.weight",
        *(f"model.encoder.language_model.layers.{index}.layer_scalar" for index in range(2)),
        "model.encoder.language_model.norm.weight",
    ]
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, arranged)]
    assert sizes[0] == sizes[1]
    fused = model.model.decoder.layers[1].experts
    for index, expert in enumerate(arranged.model.decoder.layers[1].experts):
        assert torch.equal(expert.gate_up_proj.weight, fused.gate_up_proj[index])
        assert torch.equal(expert.down_proj.weight, fused.down_proj[index])
        assert expert.down_proj.weight._base is None, "a view would keep all experts in memory"


def test_what_replaces_a_layer_replaces_it_for_the_encoder() -> None:
    model = tiny()
    arrange(model)
    ids, keep = states(21)
    copied = copy.deepcopy(model)
    before = reference(model, ids, keep, None)
    for name in ("experts.2.down_proj", "self_attn.q_proj", "input_layernorm"):
        weight = model.model.decoder.layers[0].get_submodule(name).weight
        with torch.no_grad():
            weight.add_(0.1 * torch.randn_like(weight))
        after = reference(model, ids, keep, None)
        assert float((after[1] - before[1]).abs().max()) > 1e-3, name
        before = after
    replaced = nn.Linear(32, 32, bias=False, dtype=torch.float64)
    model.set_submodule("model.decoder.layers.0.self_attn.q_proj", replaced)
    assert float((reference(model, ids, keep, None)[1] - before[1]).abs().max()) > 1e-3
    assert float((reference(copied, ids, keep, None)[1] - before[1]).abs().max()) > 1e-3, "a copy is a model of its own"


def test_transformers_ties_what_is_left() -> None:
    model = tiny()
    arrange(model)
    ids, keep = states(21)
    before = reference(model, ids, keep, None)
    model.tie_weights()
    model.model.tie_weights()
    assert torch.equal(reference(model, ids, keep, None)[0], before[0])
    embedding = model.model.decoder.embed_tokens.weight
    assert model.lm_head.weight is embedding
    assert model.model.encoder.language_model.embed_tokens.weight is embedding


def test_models_that_cannot_be_arranged_are_named() -> None:
    model: Any = tiny_diffusion_gemma()
    with pytest.raises(ValueError, match="DiffusionGemmaModel; valid: DiffusionGemmaForBlockDiffusion"):
        arrange(DiffusionGemmaModel(model.config))
    with pytest.raises(ValueError, match="tie_word_embeddings=False gives encoder and decoder weights of their own"):
        arrange(tiny_diffusion_gemma(tie_word_embeddings=False))


# What the quantizer sees


def test_a_layer_reads_what_encoder_and_decoder_give_it() -> None:
    """Calls of transformers' encoder and decoder against the one call that calibration makes of each block."""
    model, adapter = tiny(**THREE), adapter_for(tiny_diffusion_gemma())
    arrange(model)
    ids, keep = states(21, padding=(0, 0))
    draft, _ = reference(model, ids, keep, None)
    blocks = adapter.block_list(model)
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for index, block in enumerate(blocks):
        for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            name = f"{index}.{leaf}"
            hook = lambda _module, args, name=name: seen.setdefault(name, []).append(args[0])  # noqa: E731
            handles.append(block.get_submodule(leaf).register_forward_pre_hook(hook))
    reference(model, ids, keep, draft)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        (call,) = first_calls(model, blocks, adapter.denoiser(model), ids, keep, 2)
        for index, block in enumerate(blocks):
            for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
                found = inputs_of(block, [block.get_submodule(leaf)], call, torch.ones(ids.shape))
                expected = torch.cat(seen[f"{index}.{leaf}"], dim=1)
                torch.testing.assert_close(found.tokens[0], expected, rtol=0, atol=1e-5)
            call = call.following(block)


def test_the_familys_own_sampler_records_the_states() -> None:
    model, recipe = tiny_diffusion_gemma(), shrunk("dllmquant-w4a4")
    recipe["calibration"] |= {"num_states": 10, "num_prompts": 6, "min_expert_tokens": 1}
    quantizer = DLLMQuantizer(recipe)
    quantizer.quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    assert quantizer.states is not None
    batch = quantizer.states.batch
    assert len(batch) == 10
    assert len(set(batch.mask_ratio.tolist())) > 3
    assert not bool(batch.mask[:, :-SIZE].any())
    assert bool((batch.committed <= batch.mask).all())
    weights = quantizer.states.weights
    assert float(weights[batch.mask].min()) >= 1.0
    torch.testing.assert_close(weights[batch.attention_mask & ~batch.mask].unique(), torch.tensor([0.49]))
    assert not bool(weights[~batch.attention_mask].any())
    tokens = int(batch.attention_mask.sum())
    assert {sum(counts) for counts in quantizer.expert_tokens.values()} == {2 * tokens}, "one pass is counted, not two"
    assert {report.tokens for report in quantizer.reports if ".experts." not in report.name} == {tokens}


@pytest.mark.parametrize("recipe", ["smoothquant-w4a4", "awq-w4a4"])
def test_transforms_keep_the_function(recipe: str) -> None:
    model, tokenizer, settings = tiny_diffusion_gemma(), tiny_tokenizer(), Recipe.load(shrunk(recipe))
    adapter = adapter_for(model)
    arrange(model)
    original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert settings.calibration is not None
    found = collect_states(
        model, tokenizer, builtin_prompts(8, 0), settings.calibration, settings.token_weights, seed=0, progress=False
    )
    ids, keep = found.batch.ids, found.batch.attention_mask
    noise = torch.randint(147, ids.shape, generator=torch.Generator().manual_seed(3))
    before = probe_logits(adapter.denoiser(model), ids, keep, noise)
    prepare(model, adapter, make_plan(model, adapter, settings), settings, found, progress=False)
    after = probe_logits(adapter.denoiser(model), ids, keep, noise)
    assert_same_function(before, after, keep, transform=recipe, tolerance=1e-4)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, original[name])}
    layers = "model.decoder.layers"
    for leaf in ("input_layernorm", "pre_feedforward_layernorm", "pre_feedforward_layernorm_2"):
        assert f"{layers}.1.{leaf}.weight" in changed
    assert {f"{layers}.{name}.weight" for name in ("0.self_attn.v_proj", "1.self_attn.k_proj")} <= changed
    assert {f"{layers}.0.experts.{index}.gate_up_proj.weight" for index in range(4)} <= changed
    assert not any("router" in name or "self_conditioning" in name for name in changed)


@pytest.mark.parametrize("solver", ["gptaq", "qronos"])
def test_other_solvers_and_input_transforms_run(solver: str) -> None:
    """Solvers that follow the full-precision path, and an input transform of every kind."""
    recipe = shrunk("dllmquant-w4a4") | {
        "weights": {"group_size": 16, "solver": solver},
        "transforms": [
            {"kind": "hadamard", "sites": ["ff_out"]},
            {"kind": "duquant", "sites": ["attn_out"], "block_size": 16},
            {"kind": "wush", "sites": ["q_proj", "ff_proj"], "block_size": 16},
        ],
        "token_weights": {"kind": "interaction"},
    }
    recipe["calibration"] |= {"states": "clean", "max_growth": 1}
    model = tiny_diffusion_gemma()
    quantizer = DLLMQuantizer(recipe)
    quantizer.quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    transformed = [m for m in model.modules() if isinstance(m, QuantLinear) and m.input_transform is not None]
    assert len(transformed) == len(quantizer.reports) - 1, "all but the value projection, which is a site of its own"


def test_transforms_are_checked_in_bfloat16() -> None:
    """Tokens whose experts are nearly tied go where they went, or the check would blame the transform for them."""
    for seed in range(2):
        recipe = shrunk("smoothquant-w4a4")
        model = tiny_diffusion_gemma(seed).bfloat16()
        DLLMQuantizer(recipe).quantize(model, tokenizer=tiny_tokenizer(), progress=False)


def test_routes_are_held() -> None:
    model = tiny()
    arrange(model)
    other = copy.deepcopy(model)
    for layer in other.model.decoder.layers:
        with torch.no_grad():
            layer.router.proj.weight.copy_(layer.router.proj.weight.flip(0))
    ids, keep = states(20)
    with torch.no_grad():
        with recording_routes(model) as routes:
            denoise(model, ids, keep)
        with recording_routes(other) as own:
            denoise(other, ids, keep)
        with holding_routes(other, routes), recording_routes(other) as held:
            denoise(other, ids, keep)
        with recording_routes(other) as free:
            denoise(other, ids, keep)
    assert len(routes) == 2 * 2
    assert not all(torch.equal(one, two) for one, two in zip(routes, own, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(routes, held, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(own, free, strict=True)), "nothing is held afterwards"


# From a 16-bit model to a checkpoint that generates

FRESH = """
import torch
from transformers import AutoModel

import dllmquant

torch.compiler.cudagraph_mark_step_begin = lambda: None
ids, keep, threads = torch.load("given.pt")
torch.set_num_threads(threads)
model = AutoModel.from_pretrained("saved").eval()
with torch.no_grad():
    logits = dllmquant.models.adapter_for(model).denoiser(model)(ids, keep)
torch.manual_seed(0)
sequences = model.generate(ids, max_new_tokens=16, max_denoising_steps=5).sequences
torch.save((logits, sequences), "found.pt")
"""


def in_a_fresh_process(directory: Path, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and generated sequences of the checkpoint "saved" in a directory, from a process that reads it."""
    torch.save((ids, keep, torch.get_num_threads()), directory / "given.pt")
    places = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", FRESH],
        check=False,
        capture_output=True,
        text=True,
        cwd=directory,
        env=os.environ | {"PYTHONPATH": places},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: tuple[Tensor, Tensor] = torch.load(directory / "found.pt")
    return found


def generated(model: Any, ids: Tensor) -> Tensor:
    """What transformers' own `generate` makes of ids."""
    torch.manual_seed(0)
    sequences: Tensor = model.generate(ids, max_new_tokens=16, max_denoising_steps=5).sequences
    return sequences


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, keep: Tensor) -> Tensor:
    return denoise(model, ids, keep)


@pytest.mark.parametrize("recipe", ["rtn-w4a4", "gptq-w4a16", "dllmquant-w4a16", "dllmquant-awq-w4a4"])
def test_quantize_save_reload_and_generate(recipe: str, tmp_path: Path) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_diffusion_gemma()
    adapter = adapter_for(model)
    ids, keep = states(20, padding=(0, 0))
    before = logits(model, ids, keep)
    quantizer = DLLMQuantizer(shrunk(recipe))
    quantizer.quantize(model, tokenizer=tokenizer, progress=False)
    linears = dict(adapter.linears(model))
    assert all(isinstance(module, QuantLinear) for module in linears.values())
    assert [report.name for report in quantizer.reports] == list(linears)
    assert len(linears) == (7 + 2 * 4) + (6 + 2 * 4)
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert packed == set(linears), "each weight is packed once, and nothing else is"
    after = logits(model, ids, keep)
    assert float((after - before).abs().max()) > 0.1
    text = dllmquant.generate(model, tokenizer, PROMPTS[:3])
    sequences = generated(model, ids)
    model.save_pretrained(tmp_path / "saved")
    readers: tuple[Any, ...] = (AutoModel, DiffusionGemmaForBlockDiffusion)
    for cls in readers:
        reloaded, info = cls.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(info.values())
        assert type(reloaded) is type(model)
        assert torch.equal(logits(reloaded, ids, keep), after)
        assert torch.equal(generated(reloaded, ids), sequences)
    assert dllmquant.generate(reloaded, tokenizer, PROMPTS[:3]) == text
    reloaded.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, ids, keep), after)
    if recipe == "dllmquant-w4a16":
        found = in_a_fresh_process(tmp_path, ids, keep)
        assert torch.equal(found[0], after)
        assert torch.equal(found[1], sequences)


# Its sampler


def generation(model: PreTrainedModel, rows: list[list[int]], **options: Any) -> Any:
    settings = {"gen_length": 16, "steps": 6, "entropy_bound": 1.0, "confidence_threshold": 1.0}
    return generate_from_ids(model, tiny_tokenizer(), rows, **settings | options)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes transformers draw the numbers that the first prompt's stream gives."""
    own = torch.randint
    monkeypatch.setattr(torch, "randint", own)  # put back afterwards

    def force(seed: int) -> None:
        (number,) = own(2**63 - 1, (1,), generator=torch.Generator().manual_seed(seed)).tolist()
        stream = torch.Generator().manual_seed(number)

        def integers(low: int, high: int, size: tuple[int, ...], device: Any = None) -> Tensor:
            assert low == 0
            return own(high, size, generator=stream)

        def multinomial(probabilities: Tensor, num_samples: int) -> Tensor:
            uniform = torch.rand(len(probabilities), generator=stream, dtype=torch.float64)
            assert num_samples == 1
            return (probabilities.double().cumsum(-1) <= uniform[:, None]).sum(-1, keepdim=True)

        monkeypatch.setattr(torch, "randint", integers)
        monkeypatch.setattr(torch, "multinomial", multinomial)

    return force


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"entropy_bound": 5.0, "confidence_threshold": 0.6, "t_min": 0.05, "t_max": 0.1}, [4, 5, 10, 5]),
        ({"entropy_bound": 1.0, "confidence_threshold": 0.6, "stability_threshold": 0}, [1, 4, 5, 4]),
    ],
)
def test_generates_what_transformers_generates(
    settings: dict[str, Any], steps: list[int], forced: Callable[[int], None]
) -> None:
    """With the same random numbers: canvas after canvas, stopped early, ended by a token."""
    model, prompt = tiny(), [17, 5, 60, 31, 7]
    bound = EntropyBoundSamplerConfig(settings["entropy_bound"])
    given = {name: value for name, value in settings.items() if name != "entropy_bound"}
    options = {"max_new_tokens": 32, "max_denoising_steps": 10, "sampler_config": bound} | given
    whole = generation(model, [prompt], gen_length=32, steps=10, record=True, **settings)
    assert whole.trajectory.num_steps.tolist() == steps
    tokens = whole.tokens[0].tolist()
    end = next(token for token in tokens[9:] if token not in tokens[:9])  # of the second canvas or a later one
    tokenizer = SimpleNamespace(eos_token_id=end, pad_token_id=146, get_vocab=dict)
    ended = generate_from_ids(model, tokenizer, [prompt], gen_length=32, steps=10, **settings)  # type: ignore[arg-type]
    length = tokens.index(end) + 1
    assert ended.lengths is not None
    assert ended.lengths.tolist() == [length]
    forced(0)
    theirs = model.generate(torch.tensor([prompt]), **options)
    assert theirs.sequences[0, len(prompt) :].tolist() == tokens
    assert 32 / float(theirs.tokens_per_forward[0]) == pytest.approx(sum(steps))
    forced(0)
    theirs = model.generate(torch.tensor([prompt]), eos_token_id=end, pad_token_id=146, **options)
    canvases = -(-length // SIZE)
    assert theirs.sequences[0, len(prompt) :].tolist() == tokens[:length] + [146] * (canvases * SIZE - length)
    assert ended.tokens[0].tolist() == tokens[: canvases * SIZE] + [146] * (32 - canvases * SIZE)


def test_batches_change_nothing() -> None:
    model, rows = tiny(), [[17, 5, 60, 31, 7], [9], [44, 3, 101, 6, 8, 2, 77, 30, 12]]
    together, apart = (generation(model, rows, batch_size=size, record=True) for size in (3, 1))
    assert torch.equal(together.tokens, apart.tokens)
    assert torch.equal(together.trajectory.ids, apart.trajectory.ids)
    assert torch.equal(together.trajectory.mask, apart.trajectory.mask)
    assert together.trajectory.num_prompts == 2 * len(rows)
    assert together.trajectory.prompt_lengths.tolist() == [5, 13, 1, 9, 9, 17]


# What is refused


@pytest.mark.parametrize("states_kind", ["random_t", "mcs"])
def test_masking_text_is_refused(states_kind: str) -> None:
    recipe = shrunk("dllmquant-w4a4")
    recipe["calibration"] |= {"states": states_kind}
    with pytest.raises(ValueError, match=r"'diffusion_gemma': the family has no mask token, .* hold random tokens"):
        DLLMQuantizer(recipe).quantize(tiny_diffusion_gemma(), tokenizer=tiny_tokenizer(), progress=False)


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [("quarot-w4a4", "final_norm, value_output, heads"), ("rtn-w4a4-av", "value_output, heads")],
)
def test_recipes_that_need_other_attention_are_refused(recipe: str, fields: str) -> None:
    with pytest.raises(RecipeError, match=f"adapter 'diffusion_gemma' does not name {fields}"):
        DLLMQuantizer(shrunk(recipe)).quantize(tiny_diffusion_gemma(), tokenizer=tiny_tokenizer(), progress=False)


def test_attention_that_cannot_be_run_jointly_is_refused() -> None:
    ids, keep = states(20)
    model = tiny_diffusion_gemma()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='eager'; valid: 'sdpa'"):
        denoise(model, ids, keep)
    with pytest.raises(ValueError, match="use_bidirectional_attention='all'; valid: None or 'vision'"):
        denoise(tiny_diffusion_gemma(text={"use_bidirectional_attention": "all"}), ids, keep)


def test_another_canvas_than_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match="canvas_length is 4; valid: 8, the model's"):
        generate_tokens(tiny_diffusion_gemma(), tiny_tokenizer(), PROMPTS[:1], canvas_length=4)


def test_measurements_that_need_no_chance_are_refused() -> None:
    model, tokenizer = tiny_diffusion_gemma(), tiny_tokenizer()
    with pytest.raises(ValueError, match="sampler of 'diffusion_gemma' draws random numbers at every step"):
        record_agreement(model, tokenizer, PROMPTS[:1])


@pytest.mark.parametrize("form", sorted(FORMATS.keys() - {"dequantized"}))
def test_exports_that_would_name_layers_are_refused(form: str, tmp_path: Path) -> None:
    model = tiny_diffusion_gemma()
    DLLMQuantizer(shrunk("rtn-w4a16")).quantize(model, progress=False)
    with pytest.raises(ExportError, match=f"'{form}' cannot express diffusion_gemma: its layers are rearranged"):
        export_model(model, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("skip", [[], ["*.experts.2.down_proj", "*.0.self_attn.*"]], ids=["all", "some skipped"])
def test_dequantized_exports_are_transformers_own_checkpoints(skip: list[str], tmp_path: Path) -> None:
    """Read in a process without dllmquant: names, shapes and types of the original's checkpoint, and our logits."""
    model: Any = tiny_diffusion_gemma(text=THREE)
    model.save_pretrained(tmp_path / "original")
    recipe = shrunk("rtn-w4a16") | {"skip": skip}
    DLLMQuantizer(recipe).quantize(model, progress=False)
    export_model(model, tmp_path / "out", "dequantized", tokenizer=tiny_tokenizer())
    original, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("original", "out"))
    kinds = [{name: (t.shape, t.dtype) for name, t in each.items()} for each in (original, exported)]
    assert kinds[0] == kinds[1]
    changed = {name for name, tensor in original.items() if not torch.equal(tensor, exported[name])}
    assert {f"model.decoder.layers.{i}.experts.{name}" for i in range(3) for name in FUSED} <= changed
    down = "model.decoder.layers.1.experts.down_proj"
    for index in range(original[down].shape[0]):
        layer = model.get_submodule(f"model.decoder.layers.1.experts.{index}.down_proj")
        packed = isinstance(layer, QuantLinear)
        weight = layer.quantized_weight().dequantize(torch.float32) if packed else original[down][index]
        assert packed == (not skip or index != 2)
        assert torch.equal(exported[down][index], weight)

    ids, _ = states(21, padding=(0, 0))
    torch.save(ids, tmp_path / "ids.pt")
    program = """
import sys
import torch
from transformers import DiffusionGemmaForBlockDiffusion
model = DiffusionGemmaForBlockDiffusion.from_pretrained("out").eval().double()
model.set_experts_implementation("eager")  # what transformers computes in groups has no float64
ids = torch.load("ids.pt")
with torch.no_grad():
    torch.save(model(input_ids=ids[:, :-8], decoder_input_ids=ids[:, -8:]).logits, "logits.pt")
assert "dllmquant" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        expected = model.eval().double()(input_ids=ids[:, :-SIZE], decoder_input_ids=ids[:, -SIZE:]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=1e-5)


def test_requests_of_lm_eval_become_canvases() -> None:
    pytest.importorskip("lm_eval")
    from dllmquant.integrations.lm_eval.requests import read_options

    default = adapter_for(tiny_diffusion_gemma()).sampler
    asked = {"until": ["\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 300}
    options = read_options(asked, {}, default, asdict(default))
    assert (options.settings, options.max_tokens) == ((("gen_length", 512),), 300)


# Full size


def test_full_size_has_the_published_weights() -> None:
    config = {key: value for key, value in DIFFUSION_GEMMA_26B.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model("diffusion_gemma", **config))
    assert type(model).__name__ in DIFFUSION_GEMMA_26B["architectures"]
    published = diffusion_gemma_shapes(DIFFUSION_GEMMA_26B)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.all_tied_weights_keys
    assert {name: shape for name, shape in found.items() if name not in tied} == published
    assert len(published) == 1047
    assert 2 * sum(map(math.prod, published.values())) == 51_647_562_456
    sources = {source: found[source] for source in tied.values()}
    assert {found[target] for target in tied} == set(sources.values())
    assert adapter_for(model).sampler_config(model.config).canvas_length == model.config.canvas_length  # type: ignore[union-attr]


def test_every_linear_layer_of_a_full_size_period_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """One period of the 30 layers, five sliding and one full, all the others being like them."""
    config = copy.deepcopy({key: value for key, value in DIFFUSION_GEMMA_26B.items() if key != "model_type"})
    config["text_config"] |= {"num_hidden_layers": 6, "layer_types": config["text_config"]["layer_types"][:6]}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model("diffusion_gemma", **config))
    arrange(model)
    adapter = adapter_for(model)
    adapter.validate(model)
    linears: dict[str, Any] = dict(adapter.linears(model))
    inside = {
        f"{adapter.blocks}.{name}"
        for name, module in adapter.block_list(model).named_modules()
        if isinstance(module, nn.Linear)
    }
    assert inside - set(linears) == {f"{adapter.blocks}.{index}.router.proj" for index in range(6)}
    assert len(linears) == 6 * (6 + 2 * 128) + 5
    fused = {name for name in diffusion_gemma_shapes(config) if ".experts." in name and "decoder" in name}
    assert len(fused) == 2 * 6
    experts = sum(module.weight.numel() for name, module in linears.items() if ".experts." in name)
    weights = sum(module.weight.numel() for module in linears.values())
    assert (5 * experts, 5 * weights) == (22_837_985_280, 24_483_430_400)
    counted, packed = packed_size(linears.values(), Grid(4, 64, symmetric=True))
    assert (counted, packed) == (weights, weights // 2 + 2 * weights // 64)
    with capsys.disabled():
        sys.stdout.write(
            f"\ndiffusion_gemma: 5 x 6 blocks, 5 x {len(linears)} = {5 * len(linears)} linears, "
            f"{5 * weights:,} weights, {10 * weights:,} bytes in 16 bits, {5 * packed:,} in 4 bits with groups of 64\n"
        )
    for width in {module.in_features for module in linears.values()}:
        assert width % 64 == 0
        assert len(hadamard_factors(width)) >= 1
