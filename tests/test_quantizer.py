"""`DLLMQuantizer` from the outside: what it returns, saves, repeats and refuses."""

import hashlib
import json

import pytest
import torch
from datasets import Dataset
from optimum.quantization_base import OptimumQuantizer
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

import dllmquant
from dllmquant import DLLMQuantizer, Recipe, RecipeError
from dllmquant.checkpoint import weight_bytes
from dllmquant.lab.inspection import describe_checkpoint
from tests.tiny import save_tiny, tiny_llada, tiny_recipe, tiny_tokenizer

PROMPTS = [f"q: tom has {n} apples. tom loses {n % 3 + 1} of them. how many remain? a:" for n in range(5, 30)]


def quantized(recipe=None, **options):
    model = tiny_llada()
    DLLMQuantizer(recipe or tiny_recipe()).quantize(model, tokenizer=tiny_tokenizer(), progress=False, **options)
    return model


def some_ids():
    return torch.tensor(tiny_tokenizer()(PROMPTS[:1]).input_ids)


def logits(model):
    with torch.no_grad():
        return model(some_ids()).logits


def shrunk(name):
    """A built-in recipe with groups and counts that fit the tiny model."""
    changes = {"extends": name}
    recipe = Recipe.load(name)
    if recipe.weights.group_size is not None:
        changes["weights"] = {"group_size": 16}
    if recipe.calibration is not None:
        changes["calibration"] = {"num_states": 8, "num_prompts": 3}
    transforms = [transform.model_dump() for transform in recipe.transforms]
    if any(transform["kind"] == "duquant" for transform in transforms):
        changes["transforms"] = [t | {"block_size": 16} if t["kind"] == "duquant" else t for t in transforms]
    return changes


@pytest.mark.parametrize("name", Recipe.names())
def test_every_builtin_recipe_round_trips_bit_identically(name, tmp_path):
    model = quantized(shrunk(name))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(AutoModel.from_pretrained(tmp_path / "out")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activations", [None, {"bits": 8}, {"bits": 4, "group_size": 8, "symmetric": False}])
def test_round_trip_over_dtypes_and_schemes(dtype, symmetric, activations, tmp_path):
    recipe = {
        "weights": {"solver": "rtn", "bits": 3, "group_size": 8, "symmetric": symmetric},
        "calibration": None,
        "activations": activations,
    }
    model = DLLMQuantizer(recipe).quantize(tiny_llada().to(dtype), progress=False)
    model.save_pretrained(tmp_path)
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert reloaded.dtype == dtype
    assert torch.equal(logits(model), logits(reloaded))


def test_biases_and_grouped_heads_survive(tmp_path):
    torch.manual_seed(3)
    model = tiny_llada(include_bias=True, n_kv_heads=2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.1)
    DLLMQuantizer(tiny_recipe()).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(AutoModel.from_pretrained(tmp_path)))


def test_quantize_works_in_place():
    model = tiny_llada()
    assert DLLMQuantizer(tiny_recipe()).quantize(model, tokenizer=tiny_tokenizer(), progress=False) is model


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    digests = []
    for index, seed in enumerate((0, 0, 1)):
        quantized(seed=seed).save_pretrained(tmp_path / str(index))
        digests.append(hashlib.sha256((tmp_path / str(index) / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_the_cost_in_a_checkpoint_repeats_with_and_without_a_cache_hit(tmp_path):
    recipe = tiny_recipe()
    recipe["calibration"] |= {"cache": str(tmp_path / "cache")}
    configs, costs = [], []
    for index in range(2):
        model, quantizer = tiny_llada(), DLLMQuantizer(recipe)
        quantizer.quantize(model, tokenizer=tiny_tokenizer(), progress=False)
        model.save_pretrained(tmp_path / str(index))
        configs.append((tmp_path / str(index) / "config.json").read_bytes())
        costs.append(quantizer.states.cost)
    assert [cost.cached for cost in costs] == [False, True]
    assert configs[0] == configs[1]
    assert json.loads(configs[0])["quantization_config"]["cost"] == costs[0].counts()
    plain = quantized().config.quantization_config.cost
    assert plain == costs[0].counts()
    assert plain["forward_passes"] > 0


def test_a_checkpoint_without_the_cost_still_loads(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    del document["quantization_config"]["cost"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded), logits(model))
    assert reloaded.config.quantization_config.cost is None
    assert "states took" not in describe_checkpoint(tmp_path, AutoConfig.from_pretrained(tmp_path))


def test_own_prompts_change_the_calibration():
    assert not torch.equal(logits(quantized()), logits(quantized(prompts=PROMPTS)))


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_prompts_are_rows_as_well(kind):
    expected = quantized(prompts=PROMPTS[:4]).config.quantization_config.states_hash
    rows = kind([{"prompt": prompt, "id": index} for index, prompt in enumerate(PROMPTS[:4])])
    assert quantized(prompts=rows).config.quantization_config.states_hash == expected


def test_clean_states_use_completions():
    recipe = shrunk("gptq-w4a4")
    with_answers = quantized(recipe, prompts=[(prompt, " 7 - 2 = 5. #### 5") for prompt in PROMPTS])
    assert not torch.equal(logits(with_answers), logits(quantized(recipe, prompts=PROMPTS)))
    rows = [{"prompt": prompt, "completion": " 7 - 2 = 5. #### 5"} for prompt in PROMPTS]
    assert torch.equal(logits(with_answers), logits(quantized(recipe, prompts=rows)))


def test_save_dir_and_paths_as_optimum_calls_them(tmp_path):
    source = save_tiny(tmp_path / "source")
    quantizer = DLLMQuantizer.from_pretrained(str(source), recipe=tiny_recipe())
    assert isinstance(quantizer, OptimumQuantizer)
    model = quantizer.quantize(save_dir=tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert torch.equal(logits(model), logits(AutoModel.from_pretrained(tmp_path / "out")))


def test_the_checkpoint_explains_itself(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path)
    config = AutoModel.from_pretrained(tmp_path).config.quantization_config
    assert config.quant_method == "dllmquant"
    assert Recipe.load(config.recipe) == Recipe.load(tiny_recipe())
    assert config.library_version == dllmquant.__version__
    assert len(config.states_hash) == 64
    assert len(config.modules) == 14


def test_reloaded_models_can_be_saved_again(tmp_path):
    quantized().save_pretrained(tmp_path / "a")
    AutoModel.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    a, b = (tmp_path / side / "model.safetensors" for side in "ab")
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(2, 16, False), (3, 16, False), (4, 16, True), (8, None, True)]
)
def test_the_checkpoint_is_as_small_as_its_bits_say(bits, group_size, symmetric):
    recipe = {
        "weights": {"solver": "rtn", "bits": bits, "group_size": group_size, "symmetric": symmetric},
        "calibration": None,
    }
    model = DLLMQuantizer(recipe).quantize(tiny_llada(), progress=False)
    expected = 0
    for width, rows in [(32, 32)] * 4 + [(32, 64)] * 2 + [(64, 32)]:
        groups = 1 if group_size is None else width // group_size
        expected += rows * (width * bits // 8 + 2 * groups + (0 if symmetric else -(-groups * bits // 8)))
    counted = weight_bytes(model)
    assert counted.quantized_bytes == 2 * expected
    assert counted.quantized_parameters == 2 * (4 * 32 * 32 + 3 * 32 * 64)


def test_generation_works_on_the_quantized_model():
    texts = dllmquant.generate(quantized(), tiny_tokenizer(), PROMPTS[:3])
    assert len(texts) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": PROMPTS[:2]}, r"prompts: 2 given, the recipe needs 4"),
        ({"prompts": ["fine", ""]}, r"prompts\[1\]: ''"),
        ({"prompts": "one string"}, r"prompts: a single string"),
        ({"prompts": [("a", "b", "c")]}, r"prompts\[0\]"),
        ({"file_prefix": "x"}, r"file_prefix='x'"),
    ],
)
def test_bad_options_are_errors_and_change_nothing(options, message):
    model = tiny_llada()
    with pytest.raises(ValueError, match=message):
        DLLMQuantizer(tiny_recipe()).quantize(model, tokenizer=tiny_tokenizer(), progress=False, **options)
    assert torch.equal(logits(model), logits(tiny_llada()))


def test_prompts_for_a_data_free_recipe_are_an_error():
    with pytest.raises(ValueError, match="uses no calibration data"):
        DLLMQuantizer(shrunk("rtn-w4a4")).quantize(tiny_llada(), prompts=PROMPTS, progress=False)


def test_a_model_that_is_not_a_diffusion_llm_is_an_error():
    bert = BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
    )
    with pytest.raises(
        ValueError, match=r"model_type 'bert' \(BertModel\) is not a known diffusion LLM; known: .*llada"
    ):
        DLLMQuantizer("rtn-w4a4").quantize(bert, progress=False)


def test_quantizing_twice_is_an_error(tmp_path):
    model = quantized()
    with pytest.raises(ValueError, match="quantized already"):
        DLLMQuantizer(tiny_recipe()).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized already"):
        DLLMQuantizer(tiny_recipe()).quantize(str(tmp_path), tokenizer=tiny_tokenizer(), progress=False)


def test_no_model_and_no_tokenizer_are_errors():
    with pytest.raises(ValueError, match="model: none given"):
        DLLMQuantizer(tiny_recipe()).quantize()
    with pytest.raises(ValueError, match="tokenizer: the model was not loaded from a checkpoint"):
        DLLMQuantizer(tiny_recipe()).quantize(tiny_llada(), progress=False)


def test_more_states_than_recorded_is_an_error():
    recipe = tiny_recipe(calibration={"num_states": 33, "num_prompts": 4})
    with pytest.raises(ValueError, match=r"num_states: 33.*1 to 32"):
        DLLMQuantizer(recipe).quantize(tiny_llada(), tokenizer=tiny_tokenizer(), progress=False)


def test_unknown_sampler_settings_in_a_recipe_are_errors():
    recipe = tiny_recipe(calibration={"num_states": 4, "num_prompts": 2, "sampler": {"step": 4}})
    with pytest.raises(ValueError, match="sampler setting 'step' is unknown"):
        DLLMQuantizer(recipe).quantize(tiny_llada(), tokenizer=tiny_tokenizer(), progress=False)


def test_training_mode_is_restored():
    model = tiny_llada().train()
    DLLMQuantizer(tiny_recipe()).quantize(model, tokenizer=tiny_tokenizer(), progress=False)
    assert model.training


def test_bad_recipe_is_refused_at_construction():
    with pytest.raises(RecipeError):
        DLLMQuantizer("no-such-recipe")
