"""The modelling code in an export is our own, complete, and without dllmquant."""

import ast
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from dllmquant.export import export_model
from dllmquant.export.remote_code import auto_map, is_ours, modelling_files, without_plugin
from dllmquant.models import LLaDAModelLM
from tests.export.fresh import environment, load_fresh
from tests.export.quantized import IDS, quantized

OURS = [cls for cls in MODEL_MAPPING._extra_content.values() if is_ours(cls)]


def test_there_are_families_of_ours():
    assert LLaDAModelLM in OURS


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_the_files_of_a_family_are_complete(cls):
    files = modelling_files(cls)
    for name, source in files.items():
        for node in ast.walk(ast.parse(source)):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                imported = [node.module]
                assert node.level in (0, 1)
                assert not node.level or f"{node.module}.py" in files, f"{name} imports {node.module}"
            assert not any(module.split(".")[0] == "dllmquant" for module in imported), name
    for reference in auto_map(cls).values():
        stem, _, defined = reference.partition(".")
        assert f"class {defined}(" in files[f"{stem}.py"]


def test_the_names_are_the_usual_ones():
    assert {"configuration_llada.py", "modeling_llada.py"} <= modelling_files(LLaDAModelLM).keys()
    assert auto_map(LLaDAModelLM) == {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForMaskedLM": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    }


@pytest.mark.parametrize(
    "line", ["import dllmquant.core.grid", "from dllmquant import models", "from dllmquant.nn import x"]
)
def test_imports_that_cannot_be_made_relative_are_errors(line, tmp_path, monkeypatch):
    module = ModuleType("dllmquant.models.odd.modeling")
    module.__file__ = str(tmp_path / "modeling.py")
    (tmp_path / "modeling.py").write_text(f"{line}\n")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    cls = type("Odd", (LLaDAModelLM,), {"__module__": module.__name__})
    with pytest.raises(ValueError, match=r"dllmquant\.models\.odd\.modeling: line 1"):
        modelling_files(cls)


def test_the_import_of_the_plug_in_goes():
    source = '"""Text."""\n\nimport dllmquant  # noqa: F401 - a reason\nimport torch\nimport dllmquant_other\n'
    assert without_plugin(source) == '"""Text."""\n\nimport torch\nimport dllmquant_other\n'


QUANTIZE = """
import dataclasses, sys
import torch
from transformers import AutoModel
from dllmquant import DLLMQuantizer, export_model, register_adapter
from dllmquant.models.llada.adapter import ADAPTER

torch.set_num_threads(1)
source, saved, exported, ids, logits = sys.argv[1:]
register_adapter(dataclasses.replace(ADAPTER, model_type="toy"))
model = AutoModel.from_pretrained(source, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
DLLMQuantizer("rtn-w4a16").quantize(model, progress=False).save_pretrained(saved)
again = AutoModel.from_pretrained(saved, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(again(torch.load(ids)).logits, logits)
export_model(again, exported, "dequantized")
"""


def test_models_of_remote_code_keep_theirs(tmp_path):
    """A family dllmquant has no code for is quantized by it, saved, and exported with the family's own code."""
    source, saved, exported, ids, logits = (
        tmp_path / name for name in ("source", "saved", "exported", "ids", "logits")
    )
    export_model(quantized("rtn-w4a16"), source, "dequantized")
    for name in ("config.json", "configuration_llada.py"):
        text = (source / name).read_text()
        assert text.count('"llada"') == 1
        (source / name).write_text(text.replace('"llada"', '"toy"'))
    torch.save(IDS, ids)
    command = [sys.executable, "-c", QUANTIZE, *map(str, (source, saved, exported, ids, logits))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "import dllmquant" in (saved / "modeling_llada.py").read_text()  # which an export must not have
    loaded = load_fresh({"exported": exported}, IDS, tmp_path)["exported"]
    assert torch.equal(loaded.logits, torch.load(logits))
