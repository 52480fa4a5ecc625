"""The model card: its front matter is the Hub's, its numbers are the checkpoint's, and no other card is lost."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModel

from dllmquant import DLLMQuantizer, Recipe
from dllmquant.checkpoint import weight_bytes
from dllmquant.integrations.model_card import is_generated, model_card
from tests.tiny import save_tiny, tiny_llada, tiny_recipe, tiny_tokenizer

EVALUATION = {"math": {"accuracy": 0.953, "n": 1000}, "qa": {"accuracy": 0.5}}


@pytest.fixture(scope="module")
def model():
    return DLLMQuantizer(tiny_recipe()).quantize(tiny_llada(), tokenizer=tiny_tokenizer(), progress=False)


def cells(text, first):
    """The cells of the row of a table that starts with a word."""
    (line,) = re.findall(rf"^\| {re.escape(first)} \|.*$", text, re.MULTILINE)
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_front_matter_is_the_hubs(model):
    data = ModelCard(model_card(model, evaluation=EVALUATION, tags=["mine", "dllmquant"])).data
    assert data.library_name == "dllmquant"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["dllmquant", "quantization", "diffusion-language-model", "llada", "mine"]
    assert data.model_name == "llada-tiny"
    results = [(result.dataset_name, result.metric_type, result.metric_value) for result in data.eval_results]
    assert results == [("math", "accuracy", 0.953), ("qa", "accuracy", 0.5)]
    plain = ModelCard(model_card(model)).data.to_dict()
    assert set(plain) == {"library_name", "pipeline_tag", "tags"}


def test_numbers_are_the_checkpoints(model):
    text, size, config = model_card(model), weight_bytes(model), model.config.quantization_config
    assert cells(text, "packed layers") == [f"14, {size.quantized_parameters:,} weights"]
    assert cells(text, "their bytes") == [f"{size.quantized_bytes:,}, {size.bytes_per_quantized_weight:.3f} per weight"]
    assert cells(text, "bytes in all") == [f"{size.total_bytes:,}"]
    assert cells(text, "protocol") == ["`linear`"]
    assert cells(text, "calibration states, SHA-256") == [f"`{config.states_hash}`"]
    for segment, (states, recorded) in enumerate(
        zip(config.coverage["states"], config.coverage["recorded"], strict=True), start=1
    ):
        assert cells(text, str(segment)) == [f"{have} of {of}" for have, of in zip(states, recorded, strict=True)]
    assert "They took {prompts} prompts, {forward_passes} forward passes, ".format(**config.cost) in text
    (written,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert Recipe.load(yaml.safe_load(written)) == Recipe.load(tiny_recipe())
    assert Recipe.load(tiny_recipe()).summary() in text


def test_results_are_told_as_given(model):
    text = model_card(model, evaluation=EVALUATION)
    assert cells(text, "math") == ["0.953", "1,000"]
    assert cells(text, "qa") == ["0.5", ""]
    assert "## Evaluation" not in model_card(model)
    assert "model-index" not in model_card(model, evaluation={"math": {"n": 3}})


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"math": 0.5}, r"evaluation\['math'\]: 0.5; valid: task -> metric -> finite number"),
        ({"math": {}}, r"evaluation\['math'\]"),
        ({"math": {"accuracy": "high"}}, r"evaluation\['math'\]\['accuracy'\]: 'high'"),
        ({"math": {"accuracy": float("nan")}}, r"\['accuracy'\]: nan"),
        ({"math": {"accuracy": True}}, r"\['accuracy'\]: True"),
    ],
)
def test_results_that_are_no_numbers_are_errors(model, evaluation, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "out", evaluation=evaluation)
    assert not (tmp_path / "out").exists()


def test_the_code_on_the_card_loads_the_checkpoint(model, tmp_path, monkeypatch, capsys):
    DLLMQuantizer(tiny_recipe()).save(
        model, tmp_path / "path" / "to" / "this" / "checkpoint", tokenizer=tiny_tokenizer()
    )
    text = (tmp_path / "path" / "to" / "this" / "checkpoint" / "README.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(source, {})
    assert capsys.readouterr().out.startswith("['")
    assert 'path = "me/mine"' in model_card(model, name="me/mine")


def test_data_free_and_attention_recipes_have_cards():
    rtn = {"weights": {"solver": "rtn", "bits": 8, "group_size": None}, "calibration": None}
    text = model_card(DLLMQuantizer(rtn).quantize(tiny_llada(), progress=False))
    assert cells(text, "calibration states, SHA-256") == ["none"]
    assert "## Calibration states" not in text
    attention = DLLMQuantizer({"extends": "rtn-w4a4", "weights": {"group_size": 16}, "attention": {}})
    quantized = attention.quantize(tiny_llada(), progress=False)
    assert cells(model_card(quantized), "bytes of attention scales") == [f"{weight_bytes(quantized).attention_bytes:,}"]


def test_a_recipe_of_another_version_is_told_as_it_is(model, tmp_path):
    model.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    document["quantization_config"]["recipe"]["novelty"] = "of a later version"
    (tmp_path / "config.json").write_text(json.dumps(document))
    text = model_card(AutoModel.from_pretrained(tmp_path))
    assert "novelty: of a later version" in text
    assert "with the recipe `tiny`." in text


@pytest.mark.parametrize(
    ("path", "known"),
    [("GSAI-ML/LLaDA-8B-Instruct", True), ("", False), ("a/b/c", False), ("./model", False), ("/tmp/model", False)],
)
def test_the_base_model_is_told_if_it_is_on_the_hub(path, known, tmp_path):
    base = tiny_llada()
    base.config._name_or_path = path
    rtn = {"weights": {"solver": "rtn", "bits": 8, "group_size": None}, "calibration": None}
    DLLMQuantizer(rtn).quantize(base, progress=False).save_pretrained(tmp_path / "out")
    # A checkpoint that is loaded and saved again, still knows.
    AutoModel.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    for directory in ("out", "again"):
        data = ModelCard.load(tmp_path / directory / "README.md").data
        assert data.base_model == (path if known else None)
        assert getattr(data, "base_model_relation", None) == ("quantized" if known else None)


def test_a_directory_of_that_name_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "owner" / "name")
    rtn = {"weights": {"solver": "rtn", "bits": 8, "group_size": None}, "calibration": None}
    model = DLLMQuantizer(rtn).quantize("owner/name", progress=False)
    assert model.config.quantization_config.base_model is None


def test_cards_of_ours_are_known_and_edited_ones_are_not(model):
    text = model_card(model)
    assert is_generated(text)
    assert is_generated(text.replace("\n", "\r\n").replace("\r\n", "\n"))
    assert not is_generated(text.replace("14,", "15,"))
    assert not is_generated(text + "More.\n")
    assert not is_generated("# Mine\n")


def test_a_card_is_replaced_only_if_it_is_ours(model, tmp_path, caplog):
    model.save_pretrained(tmp_path, evaluation=EVALUATION)
    card = tmp_path / "README.md"
    assert "## Evaluation" in card.read_text()
    model.save_pretrained(tmp_path)
    assert card.read_text() == model_card(model)
    assert "kept" not in caplog.text
    edited = card.read_text().replace("# llada-tiny", "# Mine")
    card.write_text(edited)
    model.save_pretrained(tmp_path)
    assert card.read_text() == edited
    assert f"{card}: kept, because it was not written by dllmquant or was edited" in caplog.text
