"""`DLLMQuantizer` as code written for Optimum's quantizers calls it."""

import inspect
import json

import pytest
import torch
from optimum.quantization_base import OptimumQuantizer
from transformers import AutoModel, AutoTokenizer

from dllmquant import DLLMQuantizer, Recipe
from tests.tiny import save_tiny, tiny_llada, tiny_recipe, tiny_tokenizer

RTN = {"name": "tiny-rtn", "weights": {"solver": "rtn", "bits": 3, "group_size": 16}, "calibration": None}
IDS = torch.arange(2, 14)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def source(tmp_path):
    return save_tiny(tmp_path / "source")


def test_parameters_of_the_interface_keep_their_names_and_places():
    ours = inspect.signature(DLLMQuantizer.from_pretrained).parameters
    assert list(ours)[:2] == list(inspect.signature(OptimumQuantizer.from_pretrained).parameters)
    theirs = inspect.signature(OptimumQuantizer.quantize).parameters
    ours = inspect.signature(DLLMQuantizer.quantize).parameters
    assert list(theirs)[:3] == ["self", "save_dir", "file_prefix"]
    assert list(ours)[1:3] == ["model_or_save_dir", "file_prefix"]
    assert "save_dir" in ours


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
@pytest.mark.parametrize("call", ["positional", "positional with prefix", "by name"])
def test_a_bound_quantizer_saves_where_optimum_says(call, kind, source, tmp_path):
    quantizer = DLLMQuantizer.from_pretrained(kind(source), None, recipe=RTN)
    target = kind(tmp_path / "out")
    if call == "positional":
        model = quantizer.quantize(target, progress=False)
    elif call == "positional with prefix":
        model = quantizer.quantize(target, None, progress=False)
    else:
        model = quantizer.quantize(save_dir=target, file_prefix=None, progress=False)
    assert torch.equal(logits(model), logits(AutoModel.from_pretrained(tmp_path / "out")))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("q: 1").input_ids == tiny_tokenizer()("q: 1").input_ids


def test_all_ways_give_the_same_model(source):
    expected = logits(DLLMQuantizer(RTN).quantize(tiny_llada(), progress=False))
    for model in (
        DLLMQuantizer(RTN).quantize(model=tiny_llada(), progress=False),
        DLLMQuantizer(RTN).quantize(source, progress=False),
        DLLMQuantizer(RTN).quantize_model(tiny_llada(), progress=False),
        DLLMQuantizer(RTN).quantize_model(tiny_llada(), tiny_tokenizer(), progress=False),
        DLLMQuantizer.from_pretrained(tiny_llada(), recipe=RTN).quantize(progress=False),
        DLLMQuantizer.from_pretrained(source, recipe=RTN).quantize(progress=False),
    ):
        assert torch.equal(logits(model), expected)


def test_ambiguous_and_impossible_calls_are_errors(source, tmp_path):
    free, bound = DLLMQuantizer(RTN), DLLMQuantizer.from_pretrained(source, recipe=RTN)
    with pytest.raises(ValueError, match=r"model: given twice"):
        free.quantize(tiny_llada(), model=tiny_llada())
    with pytest.raises(ValueError, match=r"model: none given; .*from_pretrained"):
        free.quantize(save_dir=tmp_path / "out")
    for arguments, options in (((tiny_llada(),), {}), ((), {"model": tiny_llada()}), ((), {"model": source})):
        with pytest.raises(ValueError, match=r"model: this quantizer is bound to one by from_pretrained"):
            bound.quantize(*arguments, **options)
    with pytest.raises(ValueError, match=r"model: this quantizer is bound"):
        bound.quantize_model(tiny_llada())
    with pytest.raises(ValueError, match=r"save_dir: given twice, as 'a' and as 'b'"):
        bound.quantize("a", save_dir="b")
    with pytest.raises(ValueError, match=r"file_prefix='x'"):
        bound.quantize("a", "x")
    with pytest.raises(ValueError, match=r"file_name='model.onnx'"):
        DLLMQuantizer.from_pretrained(source, "model.onnx")
    assert not list(tmp_path.glob("out*"))


def test_a_bound_quantizer_loads_as_it_was_told(source):
    quantizer = DLLMQuantizer.from_pretrained(source, recipe=RTN, dtype="bfloat16")
    assert quantizer.quantize(progress=False).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype: has no effect on a model that is loaded already"):
        DLLMQuantizer.from_pretrained(tiny_llada(), recipe=RTN, dtype="bfloat16")


def test_a_tokenizer_may_be_a_path(source):
    recipe = {"extends": "dllmquant-w4a4", "weights": {"group_size": 16}, "calibration": {"num_states": 4}}
    recipe["calibration"]["num_prompts"] = 2
    given = DLLMQuantizer(recipe).quantize(tiny_llada(), tokenizer=tiny_tokenizer(), progress=False)
    named = DLLMQuantizer(recipe).quantize(tiny_llada(), tokenizer=source, progress=False)
    assert torch.equal(logits(given), logits(named))


def test_a_missing_tokenizer_is_found_before_the_work(tmp_path):
    model = tiny_llada()
    with pytest.raises(ValueError, match=r"tokenizer: the model was not loaded from a checkpoint"):
        DLLMQuantizer(tiny_recipe()).quantize(model, save_dir=tmp_path / "out", progress=False)
    assert torch.equal(logits(model), logits(tiny_llada()))
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_data_needs_no_tokenizer(tmp_path, caplog):
    model = DLLMQuantizer(RTN).quantize(tiny_llada(), save_dir=tmp_path / "out", progress=False)
    assert torch.equal(logits(model), logits(AutoModel.from_pretrained(tmp_path / "out")))
    assert "gets no tokenizer: " in caplog.text


def test_save_writes_shards_tokenizer_and_card(source, tmp_path):
    quantizer = DLLMQuantizer(RTN)
    model = quantizer.quantize_model(AutoModel.from_pretrained(source), progress=False)
    quantizer.save(model, tmp_path / "out", "10KB", evaluation={"math": {"accuracy": 0.5}})
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert "| math | 0.5 |" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert torch.equal(logits(model), logits(AutoModel.from_pretrained(tmp_path / "out")))


def test_save_without_a_tokenizer_warns(tmp_path, caplog):
    quantizer = DLLMQuantizer(RTN)
    quantizer.save(quantizer.quantize(tiny_llada(), progress=False), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    assert "gets no tokenizer: " in caplog.text
    with pytest.raises(ValueError, match=r"tokenizer: none can be loaded from"):
        quantizer.save(quantizer.quantize(tiny_llada(), progress=False), tmp_path / "b", tokenizer=tmp_path / "none")
    assert not (tmp_path / "b").exists()


def test_save_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(ValueError, match=r"model: it is not quantized by dllmquant"):
        DLLMQuantizer(RTN).save(tiny_llada(), tmp_path / "out")
    with pytest.raises(ValueError, match=r"safe_serialization=False"):
        DLLMQuantizer(RTN).save(tiny_llada(), tmp_path / "out", safe_serialization=False)


@pytest.mark.parametrize("name", ["dllmquant-w4a4", "best-w4a4-av"])
def test_dictionaries_restore_the_quantizer(name):
    document = json.loads(json.dumps(DLLMQuantizer(name).to_dict()))
    assert DLLMQuantizer.from_dict(document).recipe == Recipe.load(name)
    with pytest.raises(ValueError, match=r"quantizer: keys \['bits', 'recipe'\]; valid: recipe"):
        DLLMQuantizer.from_dict(document | {"bits": 4})
