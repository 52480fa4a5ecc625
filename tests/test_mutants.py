"""The tests are tested: each one-line break of the core must fail the test file of the module it breaks.

A copy of `core` and `nn` and of their tests is broken and run apart, under an otherwise empty package; modules that
need more are broken in a copy of everything. A mutant whose text no longer occurs exactly once is an error, so the list
cannot rot.
"""

import multiprocessing
import runpy
import shutil
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]


DRIVER = """
import os, sys, pytest
from pathlib import Path
here = Path(__file__).parent
os.chdir(here)
sys.path.insert(0, str(here))
log = os.open("log.txt", os.O_WRONLY | os.O_CREAT)
os.dup2(log, 1), os.dup2(log, 2)
sys.exit(int(pytest.main(["-c", "pytest.ini", "--rootdir", ".", *Path("files.txt").read_text().split()])))
"""
INI = """[pytest]
pythonpath = .
addopts = --import-mode=importlib -p no:cacheprovider -q -x
"""


PLAIN = ("core", "nn")
WHOLE = ("dllmquant", "tests", "recipes")


def copy_sources(target: Path, mutant: Mutant | None = None) -> None:
    """Copies what a mutant's test needs: `core` and `nn`, or everything."""
    plain = mutant is None or mutant.module.startswith(PLAIN)
    folders = ("dllmquant/core", "dllmquant/nn", "tests/core", "tests/nn", "tests/oracles") if plain else WHOLE
    for folder in folders:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    if plain:
        shutil.copy(ROOT / "tests/conftest.py", target / "tests")
        (target / "dllmquant/__init__.py").write_text('"""Nothing but core and nn."""\n')
    (target / "pytest.ini").write_text(INI)
    (target / "driver.py").write_text(DRIVER)


def run_tests(target: Path, *files: str) -> tuple[int, str]:
    """Runs test files of the copy in a process of their own; returns pytest's exit code and what it printed.

    A fork server that has loaded the heavy modules, and nothing of this project, spares each run the imports.
    """
    (target / "files.txt").write_text("\n".join(files))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "einops", "hypothesis", "pytest"])
    process = context.Process(target=runpy.run_path, args=(str(target / "driver.py"),))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, (target / "log.txt").read_text()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_applies(mutant: Mutant) -> None:
    """Quick: the text a mutant replaces occurs exactly once."""
    assert (ROOT / "dllmquant" / f"{mutant.module}.py").read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert (ROOT / mutant.test_file).is_file()


@pytest.mark.slow
def test_the_unbroken_copy_passes(tmp_path: Path) -> None:
    """Else a mutant would die of the copying."""
    copy_sources(tmp_path)
    code, output = run_tests(tmp_path, *sorted({m.test_file for m in MUTANTS if m.module.startswith(PLAIN)}))
    assert code == pytest.ExitCode.OK, output


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_dies(mutant: Mutant, tmp_path: Path) -> None:
    copy_sources(tmp_path, mutant)
    broken = tmp_path / "dllmquant" / f"{mutant.module}.py"
    text = broken.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.module}: {mutant.old!r} no longer occurs exactly once"
    broken.write_text(text.replace(mutant.old, mutant.new))
    compile(broken.read_text(), str(broken), "exec")  # a syntax error would die of itself
    code, output = run_tests(tmp_path, mutant.test_file)
    assert code == pytest.ExitCode.TESTS_FAILED, f"survived: {mutant}\n{output[-2000:]}"
