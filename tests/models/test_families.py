"""What the adapters say of their families: what was verified is verified by a test, and that test runs."""

import ast
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dllmquant.cli.app import app
from dllmquant.models import Verification, registered_adapters
from tests.models.test_end_to_end import TINY as END_TO_END
from tests.models.test_published import PUBLISHED

ROOT = Path(__file__).parents[2]
FAMILIES = sorted(registered_adapters())
CLAIMS = [(family, claim) for family in FAMILIES for claim in registered_adapters()[family].verified]


def skipping_marks(function: ast.FunctionDef) -> list[str]:
    """Marks of a test that keep it from running with all others."""
    marks = [ast.unparse(decorator) for decorator in function.decorator_list]
    return [mark for mark in marks if any(word in mark for word in ("slow", "gpu", "skip", "xfail"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_verified_in_every_way(family: str) -> None:
    adapter = registered_adapters()[family]
    assert [claim.kind for claim in adapter.verified] == ["oracle", "end-to-end", "published names"]
    assert adapter.checkpoints
    for checkpoint in adapter.checkpoints:
        owner, _, name = checkpoint.partition("/")
        assert owner
        assert name
        assert "/" not in name
    assert len(set(adapter.checkpoints)) == len(adapter.checkpoints)


def test_no_checkpoint_belongs_to_two_families() -> None:
    ids = [checkpoint for adapter in registered_adapters().values() for checkpoint in adapter.checkpoints]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(("family", "claim"), CLAIMS, ids=lambda value: getattr(value, "kind", value))
def test_what_is_claimed_is_a_test_that_runs(family: str, claim: Verification) -> None:
    path, _, name = claim.test.partition("::")
    functions = {
        node.name: node
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert name in functions, f"{family}: {claim.test} does not exist"
    assert name.startswith("test_")
    assert not skipping_marks(functions[name])
    assert "pytestmark" not in (ROOT / path).read_text(encoding="utf-8")
    assert claim.how


def test_tests_of_all_families_have_a_row_for_each() -> None:
    """They are parametrized by these tables; families without a mask token have tests of their own."""
    masked = [family for family in FAMILIES if registered_adapters()[family].mask_token_id is not None]
    assert sorted(END_TO_END) == sorted(PUBLISHED) == masked


def test_the_command_prints_what_the_adapters_say() -> None:
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0
    for family in FAMILIES:
        section = result.stdout.split(f"\n\n{family}\n")[1].split("\n\n")[0]
        adapter = registered_adapters()[family]
        assert [line.strip() for line in section.splitlines()] == [
            *adapter.checkpoints,
            *(text for claim in adapter.verified for text in (f"{claim.kind}: {claim.how}", claim.test)),
        ]
    rows = {row.split()[0]: row.split() for row in result.stdout.split("\n\n")[0].splitlines()[2:]}
    assert rows["Dream"] == ["Dream", "bidirectional", "the", "next", "position", "151666"]
    assert rows["llada"] == ["llada", "bidirectional", "their", "position", "126336"]
