"""The plan of an ablation: every run it takes, resolved and checked before the first one."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig

from dllmquant._version import __version__
from dllmquant.assets import bundled, bundled_names
from dllmquant.lab.ablation.document import (
    FORMAT_VERSION,
    REFERENCE,
    Ablation,
    AblationError,
    CellEntry,
    ModelEntry,
    Stress,
)
from dllmquant.models import registered_adapters
from dllmquant.recipe import Recipe, RecipeError


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Attributes:
        name: Name in reports.
        directory: Its checkpoint on this disk.
        stress: Outliers to plant, or None.
        digest: SHA-256 of weights, configuration, tokenizer and stress.
    """

    name: str
    directory: Path
    stress: Stress | None
    digest: str


@dataclass(frozen=True)
class PlannedRun:
    """One measurement: a cell of the grid at one seed.

    Attributes:
        model: Name of the model.
        cell: Name of the cell.
        seed: Calibration seed.
        recipe: The resolved recipe with that seed; None for the model itself.
        key: Hash of everything the result depends on.
    """

    model: str
    cell: str
    seed: int
    recipe: Recipe | None = dataclasses.field(hash=False)
    key: str

    @property
    def title(self) -> str:
        """What the run is called in progress reports."""
        return f"{self.model}/{self.cell}/seed{self.seed}"

    @property
    def file_name(self) -> str:
        """Name of its result; a renamed cell's is found by the key alone."""
        return f"{self.model}.{self.cell}.seed{self.seed}.{self.key[:16]}.json"


@dataclass(frozen=True)
class AblationPlan:
    """A validated ablation: nothing in it can be wrong any more but the quantization itself.

    Attributes:
        ablation: The document.
        models: The models.
        runs: All measurements, model by model, the model itself first.
    """

    ablation: Ablation
    models: tuple[ModelSource, ...]
    runs: tuple[PlannedRun, ...]


def plan_ablation(ablation: Ablation, *, base: Path = Path()) -> AblationPlan:
    """Finds models and recipes and checks everything that can be checked without loading a model.

    Args:
        ablation: The document.
        base: Directory that paths of recipes start from: the document's.

    Raises:
        AblationError: A recipe or a model does not exist or is not valid, two cells or models are the same, or the
            sampler draws random numbers.
    """
    recipes = {cell.name: _cell_recipe(cell, base) for cell in ablation.cells}
    models = [_find_model(entry, ablation.sampler) for entry in ablation.models]
    runs = []
    for model in models:
        runs.append(PlannedRun(model.name, REFERENCE, 0, None, _run_key(ablation, model, None)))
        for cell in ablation.cells:
            for seed in cell.seeds or ablation.seeds:
                recipe = recipes[cell.name].model_copy(update={"seed": seed})
                runs.append(PlannedRun(model.name, cell.name, seed, recipe, _run_key(ablation, model, recipe)))
    titles: dict[str, str] = {}
    for run in runs:
        if titles.setdefault(run.key, run.title) != run.title:
            raise AblationError(
                f"{run.title} and {titles[run.key]} are the same; valid: overrides that change something, models that "
                "differ"
            )
    return AblationPlan(ablation, tuple(models), tuple(runs))


def _cell_recipe(cell: CellEntry, base: Path) -> Recipe:
    """The cell's recipe with its overrides."""
    named = cell.recipe
    if named.endswith((".yaml", ".yml")):
        named = str((base / Path(named).expanduser()).absolute())
    try:
        return Recipe.load({"extends": named, **cell.overrides, "name": cell.name})
    except RecipeError as error:
        raise AblationError(f"cell {cell.name!r}: {error}") from error


def _find_model(entry: ModelEntry, sampler: Mapping[str, Any]) -> ModelSource:
    """Resolves a model to a directory and checks that it is an unquantized diffusion LLM."""
    directory = Path(entry.model).expanduser()
    try:
        if not directory.is_dir():
            if entry.model in bundled_names():
                directory = Path(bundled(entry.model))
            elif entry.model.count("/") == 1 and not entry.model.startswith((".", "~", "/")):
                patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
                directory = Path(snapshot_download(entry.model, allow_patterns=patterns))
            else:
                raise ValueError(
                    f"there is no directory {entry.model!r}; valid: a directory, a hub id (owner/name), or a bundled "
                    f"model: {', '.join(bundled_names())}"
                )
        config = AutoConfig.from_pretrained(directory)
        if config.model_type not in registered_adapters():
            known = ", ".join(sorted(registered_adapters()))
            raise ValueError(f"it is a {config.model_type!r}; valid diffusion LLMs: {known}")
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("it is quantized already; give the 16-bit original")
        if registered_adapters()[config.model_type].sampler_config(config, **sampler).stochastic:
            raise ValueError(
                "its sampler draws random numbers; set sampler: {temperature: 0, remasking: low_confidence}, so that "
                "differences are the recipes'"
            )
    except (OSError, ValueError, KeyError) as error:
        raise AblationError(f"model {entry.name!r}: {error}") from error
    return ModelSource(entry.name, directory, entry.stress, _digest(directory, entry.stress))


def _digest(directory: Path, stress: Stress | None) -> str:
    """Hashes what makes a model compute what it computes."""
    files = sorted(path for pattern in ("*.safetensors", "*.json") for path in directory.glob(pattern))
    digest = hashlib.sha256(json.dumps(None if stress is None else stress.model_dump()).encode())
    for path in files:
        with path.open("rb") as stream:
            digest.update(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _run_key(ablation: Ablation, model: ModelSource, recipe: Recipe | None) -> str:
    """Hashes what a result depends on; names, descriptions and what only changes speed are left out."""
    settings = None if recipe is None else recipe.model_dump(mode="json", exclude={"name", "description"})
    if settings is not None and settings["calibration"] is not None:
        settings["calibration"].pop("cache", None)
    content = {
        "format": FORMAT_VERSION,
        "library": __version__,
        "model": model.digest,
        "recipe": settings,
        **ablation.model_dump(mode="json", include={"tasks", "limit", "agreement_prompts", "mc_num", "sampler"}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
