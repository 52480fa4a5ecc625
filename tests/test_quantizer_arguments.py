"""What `DLLMQuantizer` makes of its arguments: options of the hub, no tokenizer, names it does not know."""

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from dllmquant import DLLMQuantizer
from tests.hub import cached_hub, give_remote_code, save_with_length
from tests.tiny import save_tiny, tiny_llada, tiny_recipe, tiny_tokenizer

DATA_FREE = {"weights": {"solver": "rtn", "group_size": 16}, "calibration": None}


@pytest.fixture
def hub(tmp_path: Path) -> dict[str, Any]:
    """Options for a repository of two revisions."""
    first = save_with_length(tmp_path / "first", 111)
    second = save_with_length(tmp_path / "second", 222, seed=1)
    cache = cached_hub(tmp_path / "cache", "org/repo", {"main": first, "v2": second})
    return {"cache_dir": cache, "local_files_only": True}


@pytest.mark.parametrize("recipe", [DATA_FREE, tiny_recipe()], ids=["without data", "with data"])
def test_the_tokenizer_comes_from_the_revision_of_the_model(
    hub: dict[str, Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    for revision, length in ({}, 111), ({"revision": "v2"}, 222):
        quantizer = DLLMQuantizer.from_pretrained("org/repo", recipe=recipe, **hub, **revision)
        quantizer.quantize(tmp_path / f"out{length}", progress=False)
        assert AutoTokenizer.from_pretrained(tmp_path / f"out{length}").model_max_length == length


def test_a_tokenizer_that_is_named_has_its_own_revision(hub: dict[str, Any], tmp_path: Path) -> None:
    other = save_with_length(tmp_path / "other", 333)
    cached_hub(hub["cache_dir"], "org/other", {"main": other})
    for name, length in (("org/other", 333), ("org/repo", 222)):
        quantizer = DLLMQuantizer.from_pretrained("org/repo", recipe=DATA_FREE, revision="v2", **hub)
        quantizer.quantize(tmp_path / name, tokenizer=name, progress=False)
        assert AutoTokenizer.from_pretrained(tmp_path / name).model_max_length == length


def test_all_options_of_the_hub_reach_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(save_tiny(tmp_path / "source"))
    loaded: dict[str, dict[str, Any]] = {}

    def model(name: str, **options: Any) -> Any:
        loaded["model"] = options
        found = tiny_llada()
        found.config._name_or_path = name
        return found

    def tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
        loaded[name] = options
        return tiny_tokenizer()

    monkeypatch.setattr(AutoModel, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
    account = {"token": "t", "cache_dir": "c", "local_files_only": True, "force_download": False, "proxies": {"a": "b"}}
    repository = {"revision": "r", "code_revision": "s", "subfolder": "", "trust_remote_code": True}
    options: dict[str, Any] = account | repository | {"dtype": "auto", "device_map": "cpu"}
    quantizer = DLLMQuantizer.from_pretrained(source, recipe=DATA_FREE, **options)
    quantizer.quantize(tmp_path / "own", progress=False)
    quantizer.quantize(tmp_path / "others", tokenizer="org/other", progress=False)
    assert loaded == {"model": options, source: account | repository, "org/other": account}


def test_remote_code_of_a_tokenizer_runs_only_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source")
    give_remote_code(source, tmp_path / "modules", monkeypatch)
    quantizer = DLLMQuantizer.from_pretrained(source, recipe=tiny_recipe())
    with pytest.raises(ValueError, match=r"(?s)tokenizer: none can be loaded from .*trust_remote_code"):
        quantizer.quantize(tmp_path / "out", progress=False)
    assert not (source / "ran").exists()
    quantizer = DLLMQuantizer.from_pretrained(source, recipe=tiny_recipe(), trust_remote_code=True)
    quantizer.quantize(tmp_path / "out", progress=False)
    assert (source / "ran").exists()


def test_a_recipe_without_data_needs_no_tokenizer_to_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_llada().save_pretrained(tmp_path / "bare")
    for source in (tiny_llada(), tmp_path / "bare"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            model = DLLMQuantizer(DATA_FREE).quantize(source, save_dir=tmp_path / "out", progress=False)
        assert "gets no tokenizer" in caplog.text
        assert not (tmp_path / "out" / "tokenizer_config.json").exists()
        reloaded = AutoModel.from_pretrained(tmp_path / "out")
        assert all(tensor.equal(model.state_dict()[name]) for name, tensor in reloaded.state_dict().items())


def test_a_tokenizer_that_is_named_must_load_before_the_work(tmp_path: Path) -> None:
    model = tiny_llada()
    with pytest.raises(ValueError, match="tokenizer: none can be loaded from"):
        DLLMQuantizer(DATA_FREE).quantize(model, tokenizer=tmp_path, save_dir=tmp_path / "out", progress=False)
    assert not hasattr(model.config, "quantization_config")
    with pytest.raises(ValueError, match="tokenizer: the model was not loaded from a checkpoint"):
        DLLMQuantizer(tiny_recipe()).quantize(model, save_dir=tmp_path / "out", progress=False)


def test_arguments_of_other_quantizers_are_errors_that_say_what_is_valid() -> None:
    quantizer = DLLMQuantizer(DATA_FREE)
    with pytest.raises(ValueError, match=r"file_prefix='x': .*named as transformers names them .*; valid: None"):
        quantizer.quantize(tiny_llada(), file_prefix="x")
    for method in (quantizer.quantize, quantizer.quantize_model):
        with pytest.raises(ValueError, match="unknown arguments dataset, bits; valid: file_prefix, model, tokenizer, "):
            method(tiny_llada(), dataset="wikitext2", bits=4)
