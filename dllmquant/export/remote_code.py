"""Modelling code that travels with a checkpoint, so that transformers loads families of ours without dllmquant.

The files are our own modules, as they are: the module of the model class and all modules of dllmquant it imports, with
these imports made relative. They must stay loadable alone, which `tests/export` checks for every family.
"""

import ast
import sys
from pathlib import Path

from transformers import PreTrainedModel

from dllmquant._version import __version__

_PACKAGE = "dllmquant"
# The classes the families are registered with, and the one that the published checkpoints and many tools ask for.
_AUTO_CLASSES = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM")


def is_ours(cls: type) -> bool:
    """Whether a class is defined in dllmquant."""
    return cls.__module__.split(".")[0] == _PACKAGE


def auto_map(cls: type[PreTrainedModel]) -> dict[str, str]:
    """Returns the `auto_map` of the configuration of a model class of ours."""
    config = cls.config_class
    assert config is not None
    model = f"{_stem(cls.__module__)}.{cls.__name__}"
    return {"AutoConfig": f"{_stem(config.__module__)}.{config.__name__}"} | dict.fromkeys(_AUTO_CLASSES, model)


def modelling_files(cls: type[PreTrainedModel]) -> dict[str, str]:
    """Returns the files that define a model class of ours, name -> source.

    Raises:
        ValueError: A module imports dllmquant in a form other than `from dllmquant.module import name`.
    """
    files: dict[str, str] = {}
    waiting = [cls.__module__]
    while waiting:
        module = waiting.pop()
        if f"{_stem(module)}.py" not in files:
            files[f"{_stem(module)}.py"], imported = _relative(module)
            waiting += imported
    return files


def without_plugin(source: str) -> str:
    """Returns a module's source without `import dllmquant`, which our own checkpoints put into remote code."""
    lines = source.splitlines(keepends=True)
    return "".join(line for line in lines if line.split("#")[0].split() != ["import", _PACKAGE])


def _relative(module: str) -> tuple[str, list[str]]:
    """Returns a module's source with relative imports, and the modules of dllmquant it imports."""
    path = Path(str(sys.modules[module].__file__))
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    imported = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == _PACKAGE for alias in node.names):
            raise ValueError(f"{module}: line {node.lineno} cannot be made relative; valid: from {_PACKAGE}.x import y")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == _PACKAGE:
            name = str(node.module)
            if name == _PACKAGE or Path(str(sys.modules[name].__file__)).name == "__init__.py":
                raise ValueError(f"{module}: line {node.lineno} imports the package {name}; valid: one of its modules")
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"from {name} ", f"from .{_stem(name)} ", 1)
            imported.append(name)
    return f"# From dllmquant {__version__}, {module} (Apache License 2.0).\n{''.join(lines)}", imported


def _stem(module: str) -> str:
    """Returns the file name of a module: `modeling_llada` for `dllmquant.models.llada.modeling`."""
    parts = module.removeprefix(f"{_PACKAGE}.").removeprefix("models.").split(".")
    return "_".join(reversed(parts))
