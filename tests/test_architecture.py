"""The direction of imports: parses every module of the package and checks what it imports against the rules below."""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dllmquant"


def within(name: str, prefixes: frozenset[str]) -> bool:
    """Whether a dotted name is one of the prefixes or lies below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


@dataclass(frozen=True)
class Layer:
    """Modules below `scope` import the standard library and what lies below `allowed`; nothing else."""

    scope: str
    allowed: frozenset[str]

    def forbids(self, module: str, imported: str) -> bool:
        if not within(module, frozenset({self.scope})):
            return False
        return imported.split(".")[0] not in sys.stdlib_module_names and not within(imported, self.allowed)


@dataclass(frozen=True)
class Reserved:
    """What lies below `target` is imported by the modules below `users`; by nothing else."""

    target: str
    users: frozenset[str]

    def forbids(self, module: str, imported: str) -> bool:
        return within(imported, frozenset({self.target})) and not within(module, self.users)


LAYERS = (
    Layer("dllmquant.core", frozenset({"dllmquant.core", "torch", "einops", "scipy"})),
    Layer("dllmquant.nn", frozenset({"dllmquant.nn", "dllmquant.core", "torch"})),
    Layer("dllmquant.decoding", frozenset({"dllmquant.decoding", "torch", "tqdm"})),
)
RESERVED = (
    Reserved("dllmquant.cli", frozenset({"dllmquant.cli", "dllmquant.__main__", "dllmquant.integrations.optimum_cli"})),
    Reserved("dllmquant.lab", frozenset({"dllmquant.lab", "dllmquant.cli"})),
    Reserved("compressed_tensors", frozenset({"dllmquant.export.compressed_tensors"})),
    Reserved("lm_eval", frozenset({"dllmquant.integrations.lm_eval"})),
    Reserved("dllmquant.integrations.lm_eval", frozenset({"dllmquant.integrations.lm_eval"})),
    Reserved(
        "transformers",
        frozenset(
            {
                "dllmquant.models",
                "dllmquant.export",
                "dllmquant.integrations",
                "dllmquant.lab",
                "dllmquant.tasks",
                "dllmquant.generation",
                "dllmquant.job",
                "dllmquant.quantizer",
                "dllmquant.checkpoint",
                "dllmquant.pipeline",
                "dllmquant.preparation",
                "dllmquant.attention_fit",
                "dllmquant.calibration",
                "dllmquant.cli",
            }
        ),
    ),
)


def imports(source: str, module: str, *, is_package: bool = False) -> list[tuple[int, str]]:
    """Lists (line, dotted name) of everything a module imports, at whatever depth.

    `from a import b` counts as `a.b`, relative imports are resolved, and so are `import_module("a")` and
    `__import__("a")` with a literal name. Imports for type checking only count like all others.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = [*base, *([node.module] if node.module else [])]
            found += [(node.lineno, ".".join([*origin, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Lists what a module imports against the rules, as "module:line imports name"."""
    return [
        f"{module}:{line} imports {name}"
        for line, name in imports(source, module, is_package=is_package)
        if any(rule.forbids(module, name) for rule in (*LAYERS, *RESERVED))
    ]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_direction(module):
    path = FILES[module]
    assert violations(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.scope)
def test_layers_exist(layer):
    members = [module for module in FILES if within(module, frozenset({layer.scope}))]
    assert len(members) > 1, f"no modules below {layer.scope}: the rule checks nothing"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dllmquant.core.gptq", "import transformers"),
        ("dllmquant.core.gptq", "import numpy as np"),
        ("dllmquant.core.gptq", "import dllmquant"),
        ("dllmquant.core.gptq", "from dllmquant.nn.packing import pack"),
        ("dllmquant.core.gptq", "from dllmquant import recipe"),
        ("dllmquant.core.gptq", "from ..nn import packing"),
        ("dllmquant.core.gptq", "from .. import recipe"),
        ("dllmquant.core.gptq", "def solve():\n    import numpy.linalg\n"),
        ("dllmquant.core.gptq", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel\n"),
        ("dllmquant.core.gptq", "import importlib\nlinalg = importlib.import_module('numpy.linalg')"),
        ("dllmquant.nn.linear", "from dllmquant.recipe import Recipe"),
        ("dllmquant.nn.linear", "import einops"),
        ("dllmquant.decoding.sampler", "from dllmquant.core.tmas import select_states"),
        ("dllmquant.decoding.sampler", "from transformers import PreTrainedModel"),
        ("dllmquant.recipe", "import transformers.utils"),
        ("dllmquant.capture", "from transformers import PreTrainedModel"),
        ("dllmquant.pipeline", "from dllmquant.lab import evaluate"),
        ("dllmquant.pipeline", "from dllmquant import lab"),
        ("dllmquant.pipeline", "import dllmquant.cli"),
        ("dllmquant.lab.demo", "from dllmquant.cli import main"),
        ("dllmquant.corekit", "import transformers"),
    ],
)
def test_checker_reports_violations(module, source):
    found = violations(source, module)
    assert len(found) == 1
    assert found[0].startswith(f"{module}:")


@pytest.mark.parametrize("source", ["from .lab import demo", "from . import lab", "from dllmquant import cli"])
def test_checker_resolves_imports_of_a_package(source):
    assert len(violations(source, "dllmquant", is_package=True)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dllmquant.core.gptq", "import math\nimport torch.nn.functional as F\nfrom einops import rearrange\n"),
        ("dllmquant.core.gptq", "from dllmquant.core.grid import Grid\nfrom . import grid\nfrom .grid import Grid\n"),
        ("dllmquant.nn.linear", "from dllmquant.core.grid import Grid\nfrom dllmquant.nn.packing import pack\n"),
        ("dllmquant.decoding.sampler", "from tqdm.auto import tqdm\nfrom .schedule import transfer_counts\n"),
        ("dllmquant.recipe", "import yaml\nimport pydantic\nfrom dllmquant.core.grid import Grid\n"),
        ("dllmquant.generation", "from transformers import PreTrainedModel"),
        ("dllmquant.models.llada.modeling", "from transformers import PreTrainedModel"),
        ("dllmquant.lab.demo", "import dllmquant\nfrom dllmquant.lab import evaluate\n"),
        ("dllmquant.cli", "from dllmquant.lab.demo import demo"),
        # Names that only begin like a reserved one.
        ("dllmquant.recipe", "import transformers_extras\nfrom dllmquant import labels\n"),
    ],
)
def test_checker_accepts_what_the_rules_allow(module, source):
    assert violations(source, module) == []
