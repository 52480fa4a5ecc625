"""What users read is executed: every Python block of the README and the docs runs, page by page."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from dllmquant.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for source in blocks(page, "python"):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, f"{page.name}", "exec"), namespace)


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
