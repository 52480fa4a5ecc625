"""What users read is executed: every Python block of the README and the docs runs, page by page."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dllmquant.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_blocks_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    """Python blocks in one namespace; on the page about other programs, commands between them, as a reader would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for kind, source in BLOCK.findall(page.read_text()):
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(source, f"{page.name}", "exec"), namespace)
        elif kind == "bash" and page.name == "ecosystem.md":
            done = subprocess.run(["bash", "-euc", source], check=False, capture_output=True, text=True)
            assert done.returncode == 0, source + done.stdout + done.stderr


def test_every_block_about_other_programs_runs():
    page = (ROOT / "docs" / "ecosystem.md").read_text()
    fences = re.findall(r"^```(.*)$", page, re.MULTILINE)
    assert {*fences[::2]} == {"python", "bash"}
    assert {*fences[1::2]} == {""}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=lambda page: page.name)
def test_recipes_in_the_docs_are_valid(page, tmp_path):
    for index, source in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{index}.yaml"
        path.write_text(source)
        Recipe.load(path)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_recipe_names_in_the_docs_exist():
    for page in PAGES:
        for name in re.findall(r"--recipe (\S+)", page.read_text()):
            assert name in Recipe.names(), f"{page.name}: {name}"
