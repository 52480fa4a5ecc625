"""How lm-eval's own command finds the model class: `lm_eval --model dllmquant`.

lm-eval looks for no plug-ins. The build puts a copy of this file, named `_dllmquant_lm_eval.py`, and beside it
`dllmquant_lm_eval.pth`, whose one line imports the copy where a Python process is started as lm-eval's command and does
nothing in any other. The copy waits until lm-eval loads its list of models and adds one name to it; dllmquant itself is
only imported if that model is asked for. Nothing but the standard library is imported here: every start of that command
runs it.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_TARGET = "dllmquant.integrations.lm_eval.model:DLLMQuantLM"


class _ModelsFinder(MetaPathFinder):
    """Finds `lm_eval.models` as Python does, and adds `dllmquant` to lm-eval's registry once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the module's own spec, whose loader registers the class at the end; None for other modules."""
        if fullname != "lm_eval.models":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                from lm_eval.api.registry import model_registry

                if "dllmquant" not in model_registry:
                    model_registry.register("dllmquant", target=_TARGET)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _ModelsFinder())
