"""Saving quantized models: what the extended class keeps of the model's own, uploads, and remote code."""

import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModel

from dllmquant import DLLMQuantizer
from dllmquant.integrations.model_card import is_generated, model_card
from dllmquant.integrations.saving import with_plugin_import
from dllmquant.models import LLaDAModelLM
from tests.tiny import tiny_llada

RTN = {"name": "tiny-rtn", "weights": {"solver": "rtn", "bits": 3, "group_size": 16}, "calibration": None}
IDS = torch.arange(2, 14)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def quantized():
    return DLLMQuantizer(RTN).quantize(tiny_llada(), progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# The class


def test_the_class_looks_like_the_models_own(tmp_path):
    model = quantized()
    assert isinstance(model, LLaDAModelLM)
    assert repr(type(model)) == repr(LLaDAModelLM)
    assert type(model) is type(quantized())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LLaDAModelLM"]
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model)
    assert type(tiny_llada()) is LLaDAModelLM


def test_models_that_are_not_quantized_get_no_card(tmp_path):
    quantized()
    tiny_llada().save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_themselves(duplicate, tmp_path):
    model = quantized()
    copied = duplicate(model)
    with torch.no_grad():
        copied.model.transformer["wte"].weight.mul_(2)
    copied.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").exists()
    assert torch.equal(logits(copied), logits(AutoModel.from_pretrained(tmp_path)))
    assert not torch.equal(logits(copied), logits(model))


def test_models_go_as_soon_as_nobody_has_them(tmp_path):
    """Without a cycle of references, memory does not wait for the garbage collector."""
    gc.disable()
    try:
        quantized().save_pretrained(tmp_path)
        for make in (quantized, lambda: AutoModel.from_pretrained(tmp_path)):
            model = make()
            watched = weakref.ref(model)
            del model
            assert watched() is None
    finally:
        gc.enable()


def test_other_processes_write_nothing_of_ours(tmp_path):
    quantized().save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out" / "README.md").exists()


def test_arguments_may_have_no_names(hub, tmp_path):
    """As transformers has them: is_main_process, state_dict, push_to_hub, max_shard_size."""
    plain, model = tiny_llada(), quantized()
    for each, directory in ((plain, tmp_path / "plain"), (model, tmp_path / "quantized")):
        each.save_pretrained(directory, False)
        assert not list(directory.glob("*.safetensors"))
        each.save_pretrained(directory, True, None, False, "10KB")
        assert len(list(directory.glob("*.safetensors"))) > 1
        assert torch.equal(logits(AutoModel.from_pretrained(directory)), logits(each))
        with pytest.raises(TypeError, match="multiple values for argument 'is_main_process'"):
            each.save_pretrained(directory, True, is_main_process=True)
    plain.save_pretrained(str(tmp_path / "other"), True, tiny_llada(seed=1).state_dict())
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "other")), logits(tiny_llada(seed=1)))
    assert hub.calls == []
    model.save_pretrained(tmp_path / "quantized", True, None, True)
    assert hub.calls[-1][0] == "upload_folder"


PUBLISHED_MAP = {
    "AutoConfig": "configuration_llada.LLaDAConfig",
    "AutoModel": "someone/llada--modeling_llada.LLaDAModelLM",
}


@pytest.mark.parametrize("make", [tiny_llada, quantized], ids=["plain", "quantized"])
def test_code_that_is_not_there_is_not_named(make, tmp_path):
    tiny_llada().save_pretrained(tmp_path / "published")
    document = json.loads((tmp_path / "published" / "config.json").read_text())
    (tmp_path / "published" / "config.json").write_text(json.dumps(document | {"auto_map": PUBLISHED_MAP}))
    model = AutoModel.from_pretrained(tmp_path / "published")
    if make is quantized:
        DLLMQuantizer(RTN).quantize(model, progress=False)
    model.save_pretrained(tmp_path / "ours")
    assert "auto_map" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    assert model.config.auto_map == PUBLISHED_MAP, "saving changes no model"
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "ours")), logits(model))


# ---------------------------------------------------------------------------------------------------------------------
# Uploads


class FakeHub:
    """Stands in for `HfApi`: remembers calls, and what was in the folder."""

    def __init__(self, card=None):
        self.card, self.calls, self.files = card, [], {}

    def __call__(self, **options):
        self.calls.append(("HfApi", options))
        return self

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def hf_hub_download(self, repo_id, name, revision=None):
        if self.card is None:
            raise EntryNotFoundError("no such file")
        return str(self.card)

    def upload_folder(self, *, folder_path, **options):
        self.calls.append(("upload_folder", options))
        self.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return "the commit"


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr("dllmquant.integrations.saving.HfApi", fake)
    return fake


def test_uploads_carry_checkpoint_and_card(hub, tmp_path):
    model = quantized()
    model.add_model_tags("tagged")
    done = model.push_to_hub(
        "mine", private=True, token="t", evaluation={"qa": {"accuracy": 0.5}}, tags=["extra"], max_shard_size="10KB"
    )
    assert done == "the commit"
    assert ("create_repo", {"repo_id": "mine", "private": True, "exist_ok": True}) in hub.calls
    assert hub.calls[0][1]["token"] == "t"
    assert sum(name.endswith(".safetensors") for name in hub.files) > 1
    text = hub.files["README.md"].decode()
    assert is_generated(text)
    assert 'path = "me/mine"' in text
    assert "| qa | 0.5 |" in text
    assert {"tagged", "extra"} < set(ModelCard(text).data.tags)
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits(model), logits(AutoModel.from_pretrained(tmp_path)))


def test_uploads_go_where_they_are_told(hub):
    quantized().push_to_hub("mine", revision="dev", create_pr=True, commit_message="hello", commit_description="why")
    assert ("create_branch", {"repo_id": "me/mine", "branch": "dev", "exist_ok": True}) in hub.calls
    (uploaded,) = [options for name, options in hub.calls if name == "upload_folder"]
    assert uploaded == {
        "repo_id": "me/mine",
        "commit_message": "hello",
        "commit_description": "why",
        "revision": "dev",
        "create_pr": True,
    }


def test_save_pretrained_uploads_too(hub, tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path / "named", push_to_hub=True, max_shard_size="10KB", private=True)
    assert ("create_repo", {"repo_id": "named", "private": True, "exist_ok": True}) in hub.calls
    written = {path.name: path.read_bytes() for path in (tmp_path / "named").iterdir()}
    assert {name for name, content in written.items() if hub.files[name] != content} == {"README.md"}
    model.save_pretrained(tmp_path / "named", push_to_hub=True, repo_id="other")
    assert hub.calls[-1][1]["repo_id"] == "me/other"


@pytest.mark.parametrize("ours", [True, False])
def test_a_card_on_the_hub_is_replaced_only_if_it_is_ours(ours, hub, tmp_path):
    model = quantized()
    hub.card = tmp_path / "README.md"
    hub.card.write_text(
        model_card(model, name="old") if ours else "---\nlicense: mit\ntags:\n- a\n---\n# Mine\n\nText.\n"
    )
    model.push_to_hub("mine")
    text = hub.files["README.md"].decode()
    if ours:
        assert text == model_card(model, name="me/mine")
    else:
        data = ModelCard(text).data
        assert data.license == "mit"
        assert data.tags[:3] == ["a", "dllmquant", "quantization"]
        assert text.endswith("# Mine\n\nText.\n")


# ---------------------------------------------------------------------------------------------------------------------
# Remote code

CONFIGURATION = '''"""A configuration."""

from __future__ import annotations

from transformers import PreTrainedConfig


class ToyConfig(PreTrainedConfig):
    model_type = "toy_dllm"

    def __init__(self, width=16, vocab_size=32, mask_token_id=1, **kwargs):
        self.width, self.vocab_size, self.mask_token_id = width, vocab_size, mask_token_id
        super().__init__(**kwargs)
'''
MODELING = """import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_toy import ToyConfig


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList([Block(config.width)])
        self.lm_head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return MaskedLMOutput(logits=self.lm_head(x))
"""
QUANTIZE = """
import sys
import torch
from transformers import AutoConfig, AutoModel
from dllmquant import DLLMQuantizer, ModelAdapter, register_adapter

register_adapter(
    ModelAdapter("toy_dllm", "layers", (("up",), ("down",)), "embed", "lm_head", "mask_token_id")
)
torch.manual_seed(0)
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_config(config, trust_remote_code=True)
recipe = {"weights": {"solver": "rtn", "bits": 4, "group_size": 8}, "calibration": None}
DLLMQuantizer(recipe).quantize(model, progress=False).save_pretrained(sys.argv[2])
torch.save(model(torch.arange(8)[None]).logits, sys.argv[3])
"""
LOAD = """
import sys
import torch
from transformers import AutoModel

assert "dllmquant" not in sys.modules
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert model.layers[0].up.weight.dtype == torch.uint8
assert torch.equal(model(torch.arange(8)[None]).logits, torch.load(sys.argv[2]))
"""


def run(program, *arguments, modules, blocked=False):
    """Runs a program in a fresh process, if wanted one that finds no dllmquant."""
    if blocked:
        program = f"import sys; sys.modules['dllmquant'] = None\n{program}"
    environment = os.environ | {"HF_MODULES_CACHE": str(modules)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def test_remote_code_imports_the_plugin(tmp_path):
    """Fresh processes that load custom code: with dllmquant installed they need not import it, without it they fail."""
    source, out, expected = tmp_path / "toy", tmp_path / "out", tmp_path / "logits.pt"
    source.mkdir()
    (source / "configuration_toy.py").write_text(CONFIGURATION)
    (source / "modeling_toy.py").write_text(MODELING)
    auto_map = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModel": "modeling_toy.ToyModel"}
    (source / "config.json").write_text(json.dumps({"model_type": "toy_dllm", "auto_map": auto_map}))
    done = run(QUANTIZE, source, out, expected, modules=tmp_path / "modules")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "config.json").read_text())["auto_map"] == auto_map
    card = (out / "README.md").read_text()
    assert "AutoModel.from_pretrained(path, trust_remote_code=True)" in card
    assert "dllmquant.generate" not in card
    done = run(LOAD, out, expected, modules=tmp_path / "modules2")
    assert done.returncode == 0, done.stderr
    done = run(LOAD.replace("assert", "()#"), out, expected, modules=tmp_path / "modules3", blocked=True)
    assert done.returncode != 0
    assert "dllmquant" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\n", "IMPORT\nx = 1\n"),
        ("# licence\n\n@decorated\nclass A:\n    pass\n", "# licence\n\nIMPORT\n@decorated\nclass A:\n    pass\n"),
        (
            '"""Doc."""\nfrom __future__ import annotations\n\nimport a\n',
            '"""Doc."""\nfrom __future__ import annotations\n\nIMPORT\nimport a\n',
        ),
        ('"""Doc."""', '"""Doc."""\nIMPORT\n'),
        ("import dllmquant\nx = 1\n", "import dllmquant\nx = 1\n"),
        ("", "\nIMPORT\n"),
    ],
)
def test_the_import_comes_before_the_first_statement(source, expected):
    line = "import dllmquant  # noqa: F401 - makes transformers read the packed weights"
    assert with_plugin_import(source) == expected.replace("IMPORT", line)
    assert with_plugin_import(with_plugin_import(source)) == with_plugin_import(source)
