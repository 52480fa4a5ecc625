"""`lm_eval --model dllmquant`: lm-eval's own command finds the class once the package is installed."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dllmquant[eval]'")

from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
STARTUP = ROOT / "dllmquant" / "integrations" / "lm_eval" / "startup.py"
INSTALLED = {"_dllmquant_lm_eval.py": STARTUP, "dllmquant_lm_eval.pth": STARTUP.with_suffix(".pth")}
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.json}, cache_dir: cache}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["q:"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.parametrize("kind", ["wheel", "wheel:editable"])
def test_builds_hold_what_python_reads_at_its_start(kind, tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(tmp_path)], check=True, cwd=ROOT)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as wheel:
        for name, source in INSTALLED.items():
            assert wheel.read(name) == source.read_bytes()


START = """
import site, sys
sys.modules.pop("_dllmquant_lm_eval", None)  # of an installation
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "_dllmquant_lm_eval"]
sys.path.insert(0, {site!r})
site.addsitedir({site!r})
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment whose Python processes start as where the files are installed; the checkout may be newer."""
    site, start = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("start")
    for name, source in INSTALLED.items():
        (site / name).write_bytes(source.read_bytes())
    (start / "sitecustomize.py").write_text(START.format(site=str(site)))
    path = [str(start), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}


def test_the_command_runs_a_task(environment, tmp_path):
    save_tiny(tmp_path / "model")
    tmp_path.joinpath("sums.json").write_text(json.dumps([{"q": "q: tom has 7 apples. how many? a:", "a": "7"}]))
    tmp_path.joinpath("sums.yaml").write_text(TASK)
    command = [sys.executable, "-m", "lm_eval", "--model", "dllmquant", "--model_args", "pretrained=model,steps=4"]
    command += ["--include_path", ".", "--tasks", "sums", "--output_path", "results"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.glob("results/**/*.json")
    results = json.loads(written.read_text())
    assert results["results"]["sums"]["sample_len"] == 1
    assert results["config"]["dllmquant"]["sampler"]["steps"] == 4


def run(environment, tmp_path, name, body):
    """Runs a script, as a console script of that name is run, and returns what it printed."""
    script = tmp_path / name
    script.write_text(body)
    done = subprocess.run(
        [sys.executable, str(script)], check=False, capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.parametrize("name", ["lm_eval", "lm-eval"])
def test_the_class_is_added_without_importing_it(environment, tmp_path, name):
    body = """
import importlib.util, sys
importlib.util.find_spec("lm_eval.models")  # looking for it is not yet loading it
from lm_eval.api.registry import model_registry
import lm_eval.models
print("dllmquant" in model_registry, "hf" in model_registry, "dllmquant" in sys.modules, "torch" in sys.modules)
from lm_eval.api.registry import get_model
print(get_model("dllmquant").__name__, get_model("dummy").__name__)
"""
    assert run(environment, tmp_path, name, body) == ["True", "True", "False", "False", "DLLMQuantLM", "DummyLM"]


def test_other_programs_start_as_ever(environment, tmp_path):
    body = "import sys\nprint('_dllmquant_lm_eval' in sys.modules)\nimport lm_eval.models\nprint(len(sys.meta_path))"
    plain = {key: value for key, value in environment.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(ROOT)}
    started, finders = run(environment, tmp_path, "other.py", body)
    assert started == "False"
    assert finders == run(plain, tmp_path, "other.py", body)[1]
