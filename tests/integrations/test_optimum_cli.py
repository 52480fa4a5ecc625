"""`optimum-cli dllmquant`: built into the wheel, into editable installs, and doing what `dllmquant` does."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "dllmquant" / "integrations" / "optimum_cli.py"
REGISTERED = "optimum/commands/register/register_dllmquant.py"


@pytest.fixture(scope="module", params=["wheel", "wheel:editable"])
def built(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", request.param, "-d", str(directory)], check=True, cwd=ROOT
    )
    (wheel,) = directory.glob("*.whl")
    return wheel


def test_builds_register_the_command(built):
    with zipfile.ZipFile(built) as wheel:
        assert wheel.read(REGISTERED) == SOURCE.read_bytes()
        # An __init__.py in Optimum's namespace would hide Optimum and all other plug-ins.
        assert [name for name in wheel.namelist() if name.startswith("optimum/")] == [REGISTERED]


@pytest.fixture(scope="module")
def optimum_cli(tmp_path_factory):
    """Runs `optimum-cli` with the command registered: by the installation, or as a build would."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if importlib.util.find_spec("optimum.commands.register") is None or not _installed():
        registered = tmp_path_factory.mktemp("site") / REGISTERED
        registered.parent.mkdir(parents=True)
        registered.write_bytes(SOURCE.read_bytes())
        path.append(str(registered.parents[3]))

    def run(*arguments):
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "COLUMNS": "100"}
        return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd="/")

    return run


def _installed():
    return importlib.util.find_spec("optimum.commands.register.register_dllmquant") is not None


def test_help_lists_the_command_without_importing_much(optimum_cli):
    done = optimum_cli("--help")
    assert done.returncode == 0
    assert "dllmquant           Quantize diffusion language models" in done.stdout
    program = (
        f"import runpy, sys; runpy.run_path({str(SOURCE)!r}); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'dllmquant')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd="/").returncode == 0


def test_quantize_does_what_dllmquant_quantize_does(optimum_cli, tmp_path):
    options = ["quantize", "--recipe", "rtn-w4a4", "llada-tiny", "--output"]
    done = optimum_cli("dllmquant", *options, tmp_path / "optimum")
    assert done.returncode == 0, done.stderr
    subprocess.run([sys.executable, "-m", "dllmquant", *options, str(tmp_path / "own")], check=True)
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / side).iterdir()} for side in ("own", "optimum")
    )
    assert ours == theirs


def test_help_and_errors_are_dllmquants(optimum_cli):
    done = optimum_cli("dllmquant", "quantize", "--help")
    assert done.returncode == 0
    assert "Usage: optimum-cli dllmquant quantize" in done.stdout
    assert "--prompt-field" in done.stdout
    done = optimum_cli("dllmquant", "quantize", "llada-tiny", "--recipe", "none", "--output", "out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe: unknown name 'none'")
