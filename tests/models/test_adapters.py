import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

import dllmquant
from dllmquant.decoding import BlockDiffusionSamplerConfig, DreamSamplerConfig, SamplerConfig
from dllmquant.models import ModelAdapter, adapter_for, adapters, register_adapter, registered_adapters
from tests.bundled import bundled_tokenizer
from tests.models.toys import (
    MASK,
    PAD,
    tiny_dream,
    tiny_fast_dllm,
    tiny_llada2,
    tiny_llada_moe,
    tiny_model,
    tiny_sdar,
    tiny_sdar_moe,
)

# A row per registered family: builds a tiny instance with random weights from the family's own configuration.
TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "Dream": tiny_dream,
    "Fast_dLLM_Qwen": lambda: tiny_fast_dllm(bd_size=8),
    "llada": lambda: tiny_model(n_heads=4, n_kv_heads=2),
    "llada2_moe": tiny_llada2,
    "lladamoe": tiny_llada_moe,
    "sdar": tiny_sdar,
    "sdar_moe": tiny_sdar_moe,
}
FAMILIES = sorted(registered_adapters())
# DiffusionGemma predicts in two passes over rearranged layers; its contract is in test_diffusion_gemma.py.
ONE_PASS = [family for family in FAMILIES if registered_adapters()[family].denoise is None]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what a test registers."""
    monkeypatch.setattr(adapters, "_ADAPTERS", registered_adapters())


@contextmanager
def hooked(
    modules: dict[str, nn.Module], see: Callable[[str, tuple[Any, ...], dict[str, Any], Any], None]
) -> Iterator[None]:
    """While the context lasts, `see` gets (name, args, kwargs, output) of every call of the modules."""
    handles = [
        module.register_forward_hook(
            lambda _module, args, kwargs, output, name=name: see(name, args, kwargs, output), with_kwargs=True
        )
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def draw(model: nn.Module, adapter: ModelAdapter, length: int = 9) -> tuple[Tensor, Tensor]:
    """Half masked ids [2, length] and their padding mask; the second row is left-padded by three."""
    mask_id = adapter.mask_id(model.config)
    embedding = model.get_submodule(adapter.embedding)
    assert isinstance(embedding, nn.Embedding)
    ids = torch.randint(embedding.num_embeddings, (2, length), generator=torch.Generator().manual_seed(0))
    ids = torch.where(ids == mask_id, (ids + 1) % embedding.num_embeddings, ids)
    ids[:, length // 2 :] = mask_id
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[1, :3] = False
    return ids, keep


# The contract every registered family keeps


def test_every_family_has_a_tiny_instance() -> None:
    assert sorted(TINY) == ONE_PASS


@pytest.mark.parametrize("family", ONE_PASS)
class TestContract:
    @pytest.fixture
    def model(self, family: str) -> PreTrainedModel:
        return TINY[family]().double().eval()

    @pytest.fixture
    def adapter(self, family: str) -> ModelAdapter:
        return registered_adapters()[family]

    def test_is_found_and_fits(self, model: PreTrainedModel, adapter: ModelAdapter, family: str) -> None:
        assert model.config.model_type == adapter.model_type == family
        assert adapter_for(model) is adapter
        adapter.validate(model)

    def test_lists_every_linear_layer_of_the_blocks_once(self, model: PreTrainedModel, adapter: ModelAdapter) -> None:
        listed = [name for name, _ in adapter.linears(model)]
        blocks = adapter.block_list(model)
        inside = [
            f"{adapter.blocks}.{index}.{name}"
            for index, block in enumerate(blocks)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and name not in adapter.kept
        ]
        assert len(listed) == len(set(listed))
        assert sorted(listed) == sorted(inside)
        assert all(model.get_submodule(name) is module for name, module in adapter.linears(model))

    def test_groups_share_one_input_and_run_in_order(self, model: PreTrainedModel, adapter: ModelAdapter) -> None:
        linears = dict(adapter.linears(model))
        calls: list[tuple[str, Tensor]] = []
        with hooked(linears, lambda name, args, kwargs, output: calls.append((name, args[0]))), torch.no_grad():
            adapter.denoiser(model)(*draw(model, adapter))
        inputs = dict(calls)
        assert len(calls) == len(inputs)
        # An expert may read no token.
        assert {name for name in linears if ".experts." not in name} <= inputs.keys() <= linears.keys()
        order = [name for name, _ in calls]
        for index, block in enumerate(adapter.block_list(model)):
            reached: dict[str, int] = {}
            seen: list[Tensor] = []
            for pattern, group in adapter.sites(block):
                names = [f"{adapter.blocks}.{index}.{leaf}" for leaf in group]
                if names[0] not in inputs:
                    continue
                positions = sorted(order.index(name) for name in names)
                # The experts of a mixture run one after the other, each with all its layers.
                owner = names[0].rpartition(".")[0] if "*" in pattern else ""
                assert positions[0] > reached.get(owner, reached.get("", -1)), names
                reached[owner] = positions[-1]
                assert all(torch.equal(inputs[name], inputs[names[0]]) for name in names), names
                if "*" not in pattern:  # two experts may read the same tokens
                    assert not any(torch.equal(inputs[names[0]], other) for other in seen), "groups could be merged"
                    seen.append(inputs[names[0]])

    def test_blocks_map_a_residual_stream(self, model: PreTrainedModel, adapter: ModelAdapter) -> None:
        blocks = {str(index): block for index, block in enumerate(adapter.block_list(model))}
        calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
        with hooked(blocks, lambda name, args, kwargs, output: calls.append((args, kwargs, output))), torch.no_grad():
            adapter.denoiser(model)(*draw(model, adapter))
        assert len(calls) == len(blocks) > 1
        for (args, kwargs, output), (next_args, next_kwargs, _) in itertools.pairwise(calls):
            stream = output[0] if isinstance(output, tuple) else output
            assert args[0].shape == stream.shape
            assert torch.equal(next_args[0], stream)
            assert all(a is b for a, b in zip(args[1:], next_args[1:], strict=True))
            assert kwargs.keys() == next_kwargs.keys()
            assert all(kwargs[key] is next_kwargs[key] for key in kwargs)

    def test_embedding_head_and_mask_token(self, model: PreTrainedModel, adapter: ModelAdapter) -> None:
        embedding = model.get_submodule(adapter.embedding)
        assert isinstance(embedding, nn.Embedding)
        assert 0 <= adapter.mask_id(model.config) < embedding.num_embeddings
        logits: list[Tensor] = []
        head = model.get_submodule(adapter.head)
        ids, keep = draw(model, adapter)
        with hooked({"head": head}, lambda name, args, kwargs, output: logits.append(output)), torch.no_grad():
            denoised = adapter.denoiser(model)(ids, keep)
        assert [output.shape for output in logits] == [denoised.shape]
        assert denoised.shape[:2] == ids.shape
        assert denoised.shape[2] > adapter.mask_id(model.config)

    def test_padding_is_hidden_and_rows_are_independent(self, model: PreTrainedModel, adapter: ModelAdapter) -> None:
        denoise = adapter.denoiser(model)
        ids, keep = draw(model, adapter)
        with torch.no_grad():
            together = denoise(ids, keep)
            alone = denoise(ids[1:, 3:], keep[1:, 3:])
        torch.testing.assert_close(together[1:, 3:], alone, rtol=0, atol=1e-4)

    def test_attention_is_as_declared(self, model: PreTrainedModel, adapter: ModelAdapter) -> None:
        ids, keep = draw(model, adapter)
        other = ids.clone()
        other[0, -1] = ids[0, 0]
        with torch.no_grad():
            denoise = adapter.denoiser(model)
            changed = (denoise(ids, keep) - denoise(other, keep)).abs().amax(-1)
        rounding = 1e-12  # of an expert, which depends on the other tokens it reads
        assert bool((changed[1] < rounding).all())
        assert bool((changed[0] > rounding).all()) == (adapter.attention == "bidirectional")

    def test_scaling_pairs_keeps_the_function(self, model: PreTrainedModel, adapter: ModelAdapter) -> None:
        ids, keep = draw(model, adapter)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            before = adapter.denoiser(model)(ids, keep)
            for block in adapter.block_list(model):
                for producer, consumers in adapter.pairs(block):
                    module: Any = block.get_submodule(producer)
                    scale = 2 ** torch.randn(len(module.weight), generator=generator, dtype=torch.float64)
                    for parameter in module.parameters():  # a norm's gain, or a linear layer's rows and bias
                        parameter.mul_(scale.reshape(-1, *[1] * (parameter.ndim - 1)))
                    for consumer in consumers:
                        cast("Tensor", block.get_submodule(consumer).weight).div_(scale)
                torch.testing.assert_close(adapter.denoiser(model)(ids, keep), before, rtol=1e-9, atol=1e-9)

    def test_sampler_settings_are_valid(self, model: PreTrainedModel, adapter: ModelAdapter) -> None:
        expected = adapter.sampler
        if isinstance(expected, BlockDiffusionSamplerConfig):
            expected = dataclasses.replace(expected, block_length=model.config.block_length)
        assert adapter.sampler_config(model.config) == expected


# Finding and registering


def user_adapter(**changes: Any) -> ModelAdapter:
    settings: dict[str, Any] = {
        "model_type": "mean_mixer",
        "blocks": "layers",
        "linear_groups": (("mix",), ("up", "gate"), ("down",)),
        "embedding": "tokens",
        "head": "unembed",
        "mask_token_id": "mask_id",
    }
    return ModelAdapter(**(settings | changes))


class MeanMixerConfig(PretrainedConfig):
    model_type = "mean_mixer"

    def __init__(self, vocab_size: int = 40, mask_id: int | None = 1, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.mask_id = mask_id
        super().__init__(**kwargs)


class MeanMixerBlock(nn.Module):
    """Adds the next token and the mean of all visible ones, then a gated layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.up = nn.Linear(8, 12)
        self.gate = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mixed = self.mix(x) * keep[..., None]
        # Padding must not matter: a token sees its right neighbour and the mean of the visible tokens.
        x = x + nn.functional.pad(mixed[:, 1:], (0, 0, 0, 1)) + mixed.sum(1, keepdim=True) / keep.sum(1)[:, None, None]
        return x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class MeanMixer(PreTrainedModel):
    """A model as a user would bring it: nothing of dllmquant in it."""

    config_class = MeanMixerConfig

    def __init__(self, config: MeanMixerConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, 8)
        self.layers = nn.ModuleList(MeanMixerBlock() for _ in range(2))
        self.unembed = nn.Linear(8, config.vocab_size)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> MaskedLMOutput:
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        return MaskedLMOutput(logits=self.unembed(x))


def user_model(seed: int = 0, **settings: Any) -> MeanMixer:
    model = MeanMixer(MeanMixerConfig(**settings)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.mark.usefixtures("registry")
def test_a_users_model_generates_after_one_registration() -> None:
    tokenizer = bundled_tokenizer()
    model = user_model(vocab_size=len(tokenizer), mask_id=tokenizer.mask_token_id)
    prompts = [" tom is in", "q: anna has 3 apples. how many remain? a:"]
    options = {"steps": 3, "gen_length": 6, "block_length": 6}
    with pytest.raises(ValueError, match=r"'mean_mixer' \(MeanMixer\) is not a known diffusion LLM; known: .*llada"):
        dllmquant.generate(model, tokenizer, prompts, **options)
    register_adapter(user_adapter())
    user_adapter().validate(model)
    texts = dllmquant.generate(model, tokenizer, prompts, **options)
    assert len(texts) == 2
    assert any(texts)
    assert [dllmquant.generate(model, tokenizer, [prompt], **options)[0] for prompt in prompts] == texts


def test_the_registry_fixture_undid_the_registration() -> None:
    assert sorted(registered_adapters()) == FAMILIES


@pytest.mark.usefixtures("registry")
def test_registering_twice_is_an_error_unless_meant() -> None:
    register_adapter(user_adapter())
    with pytest.raises(ValueError, match="model_type 'mean_mixer' is registered; pass replace=True"):
        register_adapter(user_adapter(head="other"))
    assert registered_adapters()["mean_mixer"] == user_adapter()
    register_adapter(user_adapter(head="other"), replace=True)
    assert registered_adapters()["mean_mixer"].head == "other"


def test_the_returned_registry_is_a_copy() -> None:
    registered_adapters().clear()
    assert sorted(registered_adapters()) == FAMILIES


@pytest.mark.parametrize("model", [user_model(), nn.Linear(2, 2)], ids=["unknown-type", "no-config"])
def test_unknown_families_are_errors_that_name_the_known_ones(model: nn.Module) -> None:
    known = ", ".join(FAMILIES)
    with pytest.raises(ValueError, match=f"is not a known diffusion LLM; known: {known}.*register_adapter"):
        adapter_for(model)


# Adapters that do not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": "layer"}, "blocks: no module 'layer'"),
        ({"blocks": "layers.0"}, "blocks='layers.0' is not a non-empty ModuleList"),
        ({"embedding": "token"}, "embedding: no module 'token'"),
        ({"head": "head"}, "head: no module 'head'"),
        ({"linear_groups": (("mix",), ("mlp.up",))}, r"linear_groups: no module 'layers\.0\.mlp\.up'"),
        ({"linear_groups": (("mi",),)}, r"linear_groups: no module 'layers\.0\.mi'"),
        ({"linear_groups": (("",),)}, r"linear_groups: "),
        ({"scale_pairs": (("norm", ("up",)),)}, "scale_pairs: no module 'norm'"),
        ({"scale_pairs": (("mix", ("upp",)),)}, "scale_pairs: no module 'upp'"),
        ({"site_names": (("ff_out", "dwn"),)}, "site_names: 'ff_out' is 'dwn'; valid: mix, up, down"),
        ({"site_names": (("ff_out", "gate"),)}, "site_names: 'ff_out' is 'gate'; valid: mix, up, down"),
        ({"residual_outputs": ("mix", "dwn")}, "residual_outputs: no module 'dwn'"),
        ({"value_output": ("mix", "out")}, "value_output: no module 'out'"),
        ({"final_norm": "norm"}, "final_norm: no module 'norm'"),
        ({"heads": ("n_heads", "n_heads")}, "heads: config has no integer 'n_heads'"),
        ({"mask_token_id": "mask_token_id"}, "config.mask_token_id is None, not a token id"),
    ],
)
def test_paths_that_match_nothing_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"adapter 'mean_mixer': {message}"):
        user_adapter(**changes).validate(user_model())


def test_every_block_is_checked() -> None:
    model = user_model()
    del model.layers[1].down
    with pytest.raises(ValueError, match=r"no module 'layers\.1\.down'"):
        user_adapter().validate(model)


def test_layers_of_another_kind_are_errors() -> None:
    model = user_model()
    model.layers[1].up = nn.Identity()
    with pytest.raises(ValueError, match=r"'layers\.1\.up' is a Identity, not nn\.Linear"):
        user_adapter().validate(model)


def test_an_empty_block_list_is_an_error() -> None:
    model = user_model()
    model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="blocks='layers' is not a non-empty ModuleList"):
        user_adapter().validate(model)


def test_tied_models_need_no_head() -> None:
    adapter = registered_adapters()["llada"]
    adapter.validate(tiny_model(weight_tying=True))
    untied = tiny_model()
    del untied.model.transformer["ff_out"]
    with pytest.raises(ValueError, match=r"head: no module 'model\.transformer\.ff_out'"):
        adapter.validate(untied)


# The mask token


def test_mask_id_is_a_configuration_key_or_a_number() -> None:
    config = MeanMixerConfig(mask_id=7)
    assert user_adapter().mask_id(config) == 7
    assert user_adapter(mask_token_id=5).mask_id(config) == 5
    assert user_adapter(mask_token_id=0).mask_id(config) == 0


@pytest.mark.parametrize("value", [None, "7", -1, 1.5])
def test_mask_ids_that_are_no_token_are_errors(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"config.mask_id is {value!r}, not a token id")):
        user_adapter().mask_id(MeanMixerConfig(mask_id=value))


def test_a_configuration_without_the_key_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"config\.absent is None, not a token id"):
        user_adapter(mask_token_id="absent").mask_id(MeanMixerConfig())


# Sampler settings


def test_overrides_beat_the_checkpoint_and_the_checkpoint_beats_the_family() -> None:
    family = SamplerConfig(steps=8, gen_length=16, block_length=8, temperature=0.5)
    adapter = user_adapter(sampler=family)
    config = MeanMixerConfig()
    assert adapter.sampler_config(config) == family
    config.sampler_defaults = {"steps": 4, "temperature": 0.25}
    assert adapter.sampler_config(config) == dataclasses.replace(family, steps=4, temperature=0.25)
    overridden = adapter.sampler_config(config, steps=2, cfg_scale=1.0)
    assert overridden == dataclasses.replace(family, steps=2, temperature=0.25, cfg_scale=1.0)
    # None keeps what there is; 0 and False are values.
    unheated = adapter.sampler_config(config, steps=None, temperature=0.0)
    assert unheated == dataclasses.replace(family, steps=4, temperature=0.0)
    assert adapter.sampler_config(config, steps=None).steps == 4
    config.sampler_defaults = None
    assert adapter.sampler_config(config) == family


def test_unknown_settings_are_errors_wherever_they_come_from() -> None:
    message = "sampler setting 'step' is unknown; valid: steps, gen_length, block_length"
    with pytest.raises(ValueError, match=message):
        user_adapter().sampler_config(MeanMixerConfig(), step=4)
    with pytest.raises(ValueError, match=message):
        user_adapter().sampler_config(MeanMixerConfig(), step=None)
    with pytest.raises(ValueError, match=message):
        user_adapter().sampler_config(MeanMixerConfig(sampler_defaults={"step": 4}))


def test_settings_that_do_not_fit_together_are_errors() -> None:
    with pytest.raises(ValueError, match="gen_length is 100; valid: a multiple of block_length 128"):
        user_adapter().sampler_config(MeanMixerConfig(), gen_length=100)


def test_published_llada_settings() -> None:
    assert registered_adapters()["llada"].sampler == SamplerConfig(
        steps=128, gen_length=128, block_length=128, temperature=0.0, cfg_scale=0.0, remasking="low_confidence"
    )


def test_published_dream_settings() -> None:
    assert registered_adapters()["Dream"].sampler == DreamSamplerConfig(
        steps=512, gen_length=512, temperature=0.0, top_p=None, top_k=None, eps=1e-3, remasking="entropy"
    )


def test_each_sampler_has_its_own_settings() -> None:
    adapter = user_adapter(sampler=DreamSamplerConfig(steps=4, gen_length=6))
    config = MeanMixerConfig(sampler_defaults={"top_p": 0.9, "steps": 3})
    found = adapter.sampler_config(config, remasking="topk_margin", temperature=None)
    assert found == DreamSamplerConfig(steps=3, gen_length=6, top_p=0.9, remasking="topk_margin")
    with pytest.raises(ValueError, match="sampler setting 'block_length' is unknown; valid: steps, gen_length, temp"):
        adapter.sampler_config(config, block_length=3)
    with pytest.raises(ValueError, match="sampler setting 'top_p' is unknown; valid: steps, gen_length, block_length"):
        user_adapter().sampler_config(config)


# Aligned logits


class NextPosition(nn.Module):
    """Logits at position j are one-hot: the number of visible tokens up to j, which is what stands at j + 1."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> MaskedLMOutput:
        count = attention_mask.long().cumsum(1)
        return MaskedLMOutput(logits=9.0 * nn.functional.one_hot(count, 16).double())


def test_denoisers_align_shifted_logits() -> None:
    model: Any = NextPosition()
    ids, keep = torch.zeros((1, 6), dtype=torch.long), torch.ones((1, 6), dtype=torch.bool)
    assert user_adapter().denoiser(model)(ids, keep).argmax(-1).tolist() == [[1, 2, 3, 4, 5, 6]]
    # Logits at j predict position j + 1; nothing predicts the first position, which keeps its own.
    shifted = user_adapter(logits_shift=1).denoiser(model)(ids, keep)
    assert shifted.argmax(-1).tolist() == [[1, 1, 2, 3, 4, 5]]


def test_the_first_token_after_padding_keeps_its_own_logits() -> None:
    model: Any = NextPosition()
    ids = torch.zeros((3, 5), dtype=torch.long)
    keep = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    shifted = user_adapter(logits_shift=1).denoiser(model)
    expected = [[1, 1, 2], [1, 1, 2, 3, 4], [1]]
    for mask in (keep, keep.bool()):
        found = shifted(ids, mask).argmax(-1)
        assert [row[own.bool()].tolist() for row, own in zip(found, keep, strict=True)] == expected


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(("shift", "first"), [(0, 1), (1, 0)])
def test_shifted_models_generate_from_the_last_prompt_token(
    shift: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that predicts each position's index, read at the position itself or one before it."""
    tokenizer = bundled_tokenizer()
    register_adapter(user_adapter(logits_shift=shift))
    model = user_model(vocab_size=len(tokenizer), mask_id=tokenizer.mask_token_id)
    counting = NextPosition()

    def forward(input_ids: Tensor, attention_mask: Tensor) -> MaskedLMOutput:
        logits = counting(input_ids, attention_mask).logits
        return MaskedLMOutput(logits=nn.functional.pad(logits, (3, len(tokenizer) - 19)))

    monkeypatch.setattr(model, "forward", forward)
    generation = dllmquant.generation.generate_tokens(
        model, tokenizer, [" tom is in", " tom"], steps=4, gen_length=4, block_length=4
    )
    lengths = [3, 1]
    # One-hot entries are moved by three, past the special tokens.
    expected = [[3 + length + j + first for j in range(4)] for length in lengths]
    assert generation.tokens.tolist() == expected


def test_denoiser_passes_ids_and_mask_on() -> None:
    model = tiny_model(dtype=torch.float64)
    adapter = registered_adapters()["llada"]
    ids = torch.tensor([[PAD, 3, 4, MASK], [5, 6, MASK, MASK]])
    keep = ids != PAD
    with torch.no_grad():
        logits = adapter.denoiser(model)(ids, keep)
        assert torch.equal(logits, model(input_ids=ids, attention_mask=keep).logits)
        assert not torch.equal(logits, model(input_ids=ids).logits)
