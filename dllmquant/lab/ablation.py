"""Ablations: a grid of models, recipes with overrides, and seeds, measured cell by cell and compared in pairs.

The result of every run is one file, named by what it is and keyed by what it depends on, so an interrupted ablation
goes on where it stopped and a changed recipe is measured again. The tables are made of these files alone.
"""

import copy
import dataclasses
import gc
import hashlib
import json
import logging
import math
import os
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import yaml
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dllmquant._version import __version__
from dllmquant.assets import bundled, bundled_names
from dllmquant.checkpoint import weight_bytes
from dllmquant.lab.agreement import (
    BUCKETS,
    Agreement,
    AgreementReference,
    FrontierFlips,
    KLBucket,
    divergence_summary,
    measure_agreement,
    record_agreement,
)
from dllmquant.lab.evaluate import ItemResult, TaskScore, evaluate, peak_memory
from dllmquant.lab.plots import plot_differences
from dllmquant.lab.statistics import (
    PairedDifference,
    RecoveredShare,
    paired_difference_clustered,
    recovered_share,
)
from dllmquant.lab.tables import aligned, comma_separated, markdown
from dllmquant.models import adapter_for, registered_adapters
from dllmquant.quantizer import DLLMQuantizer
from dllmquant.recipe import Recipe, RecipeError
from dllmquant.tasks import TASKS, take
from dllmquant.transforms.outliers import plant_outliers

logger = logging.getLogger(__name__)

REFERENCE = "16-bit"
"""Name of the cell that is the model itself, in the type of its checkpoint."""
FORMAT_VERSION = 1
# A model whose weights take less is kept and copied for every cell; a larger one is loaded anew, never held twice.
_COPY_BYTES = 2**30
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"


class AblationError(ValueError):
    """An ablation that cannot be run: the message names the field, its value and what would be valid."""


# ---------------------------------------------------------------------------------------------------------------------
# The document


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stress(_Section):
    """Planted outliers (`dllmquant.transforms.outliers`): the same function, harder to quantize.

    Attributes:
        channels: Outlier channels per activation.
        gain: How much larger they become; a power of two above 1.
    """

    channels: int = Field(default=1, ge=1)
    gain: float = 8.0

    @field_validator("gain")
    @classmethod
    def _gain_is_exact(cls, gain: float) -> float:
        if gain <= 1 or math.frexp(gain)[0] != 0.5:
            raise ValueError("valid: a power of two above 1, so that floating point stays exact")
        return gain


class ModelEntry(_Section):
    """A model of the ablation.

    Attributes:
        model: Name of a bundled model, directory (from where the program runs), or hub id.
        name: Name in reports; the last part of `model` if not given.
        stress: Outliers to plant; the model then needs a name.
    """

    model: str = Field(min_length=1)
    name: str = Field(default="", pattern=_NAME)
    stress: Stress | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_a_name(cls, document: Any) -> Any:
        if isinstance(document, str):
            document = {"model": document}
        if not isinstance(document, dict) or document.get("name") or not isinstance(document.get("model"), str):
            return document
        if document.get("stress") is not None:
            raise ValueError("name: a model with stress needs one, to tell it from the model itself")
        return document | {"name": Path(document["model"]).name}


class CellEntry(_Section):
    """A recipe of the ablation, with changes.

    Attributes:
        recipe: Name of a built-in recipe, or a YAML file beside the ablation.
        name: Name in reports; the recipe's if not given.
        overrides: Settings that replace the recipe's, section by section, as a recipe does that extends another.
        seeds: Calibration seeds; the ablation's if not given.
        baseline: The cell whose loss this one is to recover; the ablation's if not given.
    """

    recipe: str = Field(min_length=1)
    name: str = Field(default="", pattern=_NAME)
    overrides: dict[str, Any] = Field(default_factory=dict)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    baseline: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_a_name(cls, document: Any) -> Any:
        if isinstance(document, str):
            document = {"recipe": document}
        if not isinstance(document, dict) or document.get("name") or not isinstance(document.get("recipe"), str):
            return document
        recipe = document["recipe"]
        return document | {"name": Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe}

    @field_validator("overrides")
    @classmethod
    def _overrides_are_settings(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        for key, instead in (("extends", "recipe"), ("name", "name"), ("seed", "seeds")):
            if key in overrides:
                raise ValueError(f"{key!r} is no override; use the cell's own {instead!r}")
        return overrides


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Ablation(_Section):
    """What is compared with what, on what; see `Ablation.load`.

    Attributes:
        version: Version of the format.
        name: Title of the report.
        description: A few words under it, such as the question and the design.
        models: The models.
        tasks: Held-out tasks; those that generate are pooled into one accuracy.
        limit: Problems per task.
        seeds: Calibration seeds of the cells that name none.
        cells: The recipes. The model itself is always measured too, once, as "16-bit".
        compare: Pairs of cells (first minus second); all cells against "16-bit" if there are none.
        baseline: The cell whose loss the others are to recover; None reports no recovered shares.
        agreement_prompts: Prompts on which trajectories and predictions are compared with the original's.
        batch_size: Sequences per forward pass; changes speed, and results only by the rounding of 16-bit types.
        mc_num: Masks drawn per choice in tasks scored by likelihood.
        sampler: Sampler settings that replace the checkpoint's; without random numbers.
    """

    version: Literal[1] = 1
    name: str = Field(min_length=1)
    description: str = ""
    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1)]
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("math", "code")
    limit: int = Field(default=1000, ge=1)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    cells: Annotated[tuple[CellEntry, ...], Field(min_length=1)]
    compare: tuple[Annotated[tuple[str, str], BeforeValidator(_pair)], ...] = ()
    baseline: str | None = None
    agreement_prompts: int = Field(default=64, ge=1)
    batch_size: int = Field(default=64, ge=1)
    mc_num: int = Field(default=16, ge=1)
    sampler: dict[str, Any] = Field(default_factory=dict)

    @field_validator("tasks")
    @classmethod
    def _tasks_exist(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"unknown {task!r}; valid: {', '.join(TASKS)}")
        return tasks

    @model_validator(mode="after")
    def _names_are_clear(self) -> Self:
        cells = [cell.name for cell in self.cells]
        _check_unique("models", [model.name for model in self.models])
        _check_unique("cells", cells)
        _check_unique("tasks", self.tasks)
        for seeds in (self.seeds, *(cell.seeds or () for cell in self.cells)):
            _check_unique("seeds", seeds)
        if REFERENCE in cells:
            raise ValueError(f"cells: the name {REFERENCE!r} is the unquantized model's; give another")
        used = [("compare", name) for pair in self.compare for name in pair]
        used += [("baseline", name) for name in (self.baseline, *(cell.baseline for cell in self.cells)) if name]
        for field, name in used:
            if name not in (*cells, REFERENCE) or (field, name) == ("baseline", REFERENCE):
                raise ValueError(f"{field}: there is no cell {name!r}; valid: {', '.join(cells)}")
        return self

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any]) -> "Ablation":
        """Loads an ablation; what its recipes and models are is for `plan_ablation` to find out.

        Args:
            source: The path of a YAML file, or its content.

        Raises:
            AblationError: The document is not valid YAML, a key is unknown, a value is out of range, or a name is used
                twice or not at all.
            FileNotFoundError: There is no such file.
        """
        document: Any = source
        if isinstance(source, str | Path):
            try:
                document = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise AblationError(f"{source}: not a YAML document: {error}") from None
        if not isinstance(document, Mapping):
            raise AblationError(f"{source}: an ablation is a mapping of settings, not {type(document).__name__}")
        origin = str(source) if isinstance(source, str | Path) else "ablation"
        try:
            return cls.model_validate(dict(document))
        except ValidationError as error:
            raise AblationError(f"{origin}: " + "; ".join(_explain(item) for item in error.errors())) from None


_SECTIONS: dict[str | int, type[BaseModel]] = {"models": ModelEntry, "cells": CellEntry, "stress": Stress}


def _explain(error: Any) -> str:
    """Turns one pydantic error into "field: problem"."""
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: type[BaseModel] = Ablation
        for part in error["loc"][:-1]:
            section = _SECTIONS.get(part, section)
        return f"{location}: unknown key; valid: {', '.join(section.model_fields)}"
    message: str = error["msg"].removeprefix("Value error, ")
    return f"{location}: {message} (got {error['input']!r})" if location and error["input"] is not None else message


def _check_unique(field: str, names: Sequence[object]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{field}: {twice[0]!r} is there twice; valid: each once")


# ---------------------------------------------------------------------------------------------------------------------
# The plan


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


# ---------------------------------------------------------------------------------------------------------------------
# The result of one run


@dataclass(frozen=True)
class RunResult:
    """What one run measured, or how it failed.

    Attributes:
        model: Name of the model.
        cell: Name of the cell.
        seed: Calibration seed.
        key: Hash of everything the result depends on.
        recipe: The resolved recipe; None for the model itself.
        items: Results of every problem.
        scores: By task.
        agreement: With the original; None if the run failed.
        bytes_per_weight: Bytes per weight of the layers recipes quantize.
        total_bytes: Bytes of all weights.
        seconds: Wall time of "quantization", "evaluation" and "agreement".
        metadata: Versions, git sha, model digest, device, sampler, peak memory in bytes.
        error: None, or the traceback of what went wrong.
    """

    model: str
    cell: str
    seed: int
    key: str
    recipe: dict[str, Any] | None
    items: tuple[ItemResult, ...] = ()
    scores: dict[str, TaskScore] = dataclasses.field(default_factory=dict)
    agreement: Agreement | None = None
    bytes_per_weight: float = 0.0
    total_bytes: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None

    def save(self, path: Path) -> None:
        """Writes the result as JSON; an interrupted write leaves no file, or the old one."""
        _write(path, _json({"format_version": FORMAT_VERSION, **asdict(self)}))

    @classmethod
    def load(cls, path: Path) -> "RunResult":
        """Reads a file that `save` wrote.

        Raises:
            ValueError: The file holds something else, or another version of the format.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.pop("format_version") != FORMAT_VERSION:
                raise ValueError("another format version")
            agreement = document.pop("agreement")
            return cls(
                **document
                | {
                    "items": tuple(ItemResult(**item) for item in document["items"]),
                    "scores": {task: TaskScore(**score) for task, score in document["scores"].items()},
                },
                agreement=None
                if agreement is None
                else Agreement(
                    tuple(agreement["first_divergence"]),
                    FrontierFlips(**agreement["frontier"]),
                    tuple(KLBucket(**bucket) for bucket in agreement["kl"]),
                ),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not the result of an ablation's run ({error}); delete it to run again") from None


def find_result(run: PlannedRun, output: Path) -> RunResult | None:
    """Returns the result of a run from an ablation's directory, under whatever name; None if there is none.

    Raises:
        ValueError: The file cannot be read.
    """
    for path in sorted((output / "cells").glob(f"*.{run.key[:16]}.json")):
        result = RunResult.load(path)
        if result.key == run.key:
            return dataclasses.replace(result, model=run.model, cell=run.cell)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Running


class _Original:
    """A model of the ablation: fresh instances of it, and what the original did with the agreement prompts."""

    def __init__(self, source: ModelSource, ablation: Ablation, device: str) -> None:
        self.source, self.device, self._ablation = source, device, ablation
        self._kept: PreTrainedModel | None = None
        self._is_large = False
        self._reference: AgreementReference | None = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.source.directory)
        return tokenizer

    def fresh(self) -> PreTrainedModel:
        """An instance that may be changed: a copy of a small model, or else one that is loaded again."""
        if self._kept is not None:
            return copy.deepcopy(self._kept)
        model: PreTrainedModel = AutoModel.from_pretrained(self.source.directory, device_map=self.device).eval()
        if self.source.stress is not None:
            plant_outliers(model, adapter_for(model), **self.source.stress.model_dump())
        self._is_large = weight_bytes(model).total_bytes > _COPY_BYTES
        if self._is_large:
            return model
        self._kept = model
        return copy.deepcopy(model)

    def reference(self, tokenizer: PreTrainedTokenizerBase) -> AgreementReference:
        if self._reference is None:
            self._reference = record_agreement(
                self.fresh(),
                tokenizer,
                _agreement_prompts(self._ablation),
                batch_size=self._ablation.batch_size,
                **self._ablation.sampler,
            )
            self.release()
        return self._reference

    def release(self) -> None:
        """Frees instances that nobody holds, cycles included, before the next large one is loaded."""
        if self._is_large:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@dataclass(frozen=True, eq=False)
class AblationResult:
    """What an ablation found and wrote.

    Attributes:
        text: The report for a terminal.
        summary: The numbers.
        failed: Titles of the runs that failed.
        files: results.json, results.csv, results.md and results.png.
    """

    text: str
    summary: "Summary"
    failed: tuple[str, ...]
    files: tuple[Path, ...]


def run_ablation(
    plan: AblationPlan,
    output: Path,
    *,
    device: str = "cpu",
    progress: bool = False,
    report: Callable[[str], object] = logger.info,
) -> AblationResult:
    """Measures what is not measured yet and writes the tables, anew after every run.

    A run that fails is recorded with its traceback, shown in the tables, and tried again next time; the others go on.

    Args:
        plan: From `plan_ablation`.
        output: Directory for cells/, trajectories/ (recorded for calibration, shared between cells) and results.json,
            .csv, .md and .png.
        device: Where to run.
        progress: Whether to show a progress bar.
        report: Told, in a line each, which runs are finished.

    Raises:
        ValueError: A result in the directory cannot be read.
    """
    found = {run: find_result(run, output) for run in plan.runs}
    results = {run: result for run, result in found.items() if result is not None and result.error is None}
    missing = [run for run in plan.runs if run not in results]
    report(f"{plan.ablation.name}: {len(plan.runs)} runs, {len(results)} of them done before")
    for run in results:
        report(f"finished before: {run.title}")
    sources = {source.name: source for source in plan.models}
    original: _Original | None = None
    with tqdm(total=len(plan.runs), initial=len(results), unit="run", disable=not progress) as bar:
        for index, run in enumerate(missing):
            bar.set_description(run.title)
            if original is not None:
                original.release()
            if original is None or run.model != missing[index - 1].model:
                original = _Original(sources[run.model], plan.ablation, device)
            result = _measure(run, original, plan.ablation, trajectories=output / "trajectories")
            result.save(output / "cells" / run.file_name)
            results[run] = result
            report(_finished(run, result))
            _write_tables(plan, summarize(plan, results), output)
            bar.update()
    summary = summarize(plan, results)
    header, rows = _accuracy_table(plan.ablation, summary)
    files = (*_write_tables(plan, summary, output), _draw(plan, summary, output / "results.png"))
    failed = tuple(run.title for run, result in results.items() if result.error is not None)
    lines = [aligned(header, rows, left=3), *(_failure(row) for row in summary.rows if row.errors)]
    text = "\n\n".join(["\n".join(lines), "\n".join(f"wrote {path}" for path in files)])
    return AblationResult(text, summary, failed, files)


def _measure(run: PlannedRun, original: _Original, ablation: Ablation, *, trajectories: Path) -> RunResult:
    """One run, from a fresh model to its numbers."""
    source, device = original.source, original.device
    result = RunResult(
        model=run.model,
        cell=run.cell,
        seed=run.seed,
        key=run.key,
        recipe=None if run.recipe is None else run.recipe.to_dict(),
        metadata={"dllmquant": __version__, "model_digest": source.digest, "device": device},
    )
    _reset_peak_memory()
    try:
        tokenizer = original.tokenizer()
        reference = original.reference(tokenizer)
        model = original.fresh()
        times = [time.perf_counter()]
        if run.recipe is not None:
            recipe = _sharing_trajectories(run.recipe, trajectories)
            DLLMQuantizer(recipe).quantize(model, tokenizer=tokenizer, progress=False)
        times.append(time.perf_counter())
        evaluation = evaluate(
            model,
            tokenizer,
            ablation.tasks,
            limit=ablation.limit,
            batch_size=ablation.batch_size,
            mc_num=ablation.mc_num,
            progress=False,
            **ablation.sampler,
        )
        times.append(time.perf_counter())
        agreement = measure_agreement(reference, model, tokenizer, batch_size=ablation.batch_size)
        times.append(time.perf_counter())
        size = weight_bytes(model)
        names = ("quantization", "evaluation", "agreement")
        return dataclasses.replace(
            result,
            items=evaluation.items,
            scores=evaluation.scores,
            agreement=agreement,
            bytes_per_weight=_linear_bytes(model) if run.recipe is None else size.bytes_per_quantized_weight,
            total_bytes=size.total_bytes,
            seconds={name: times[index + 1] - times[index] for index, name in enumerate(names)},
            metadata=result.metadata
            | evaluation.metadata
            | {"sampler": evaluation.sampler, "peak_memory_bytes": _peak_memory(device)},
        )
    except Exception as error:  # whatever it is, it is this run's result, and the others go on
        logger.debug("%s failed", run.title, exc_info=error)
        return dataclasses.replace(result, error="".join(traceback.format_exception(error)))


def _sharing_trajectories(recipe: Recipe, directory: Path) -> Recipe:
    """The recipe with a place for recorded trajectories: cells whose calibration records the same share the record."""
    if recipe.calibration is None or recipe.calibration.cache is not None:
        return recipe
    calibration = recipe.calibration.model_copy(update={"cache": str(directory)})
    return recipe.model_copy(update={"calibration": calibration})


def _agreement_prompts(ablation: Ablation) -> list[str]:
    """Held-out prompts, the tasks taking turns."""
    tasks = [task for task in ablation.tasks if _generates(task)] or ablation.tasks
    items = [take(task, "heldout", ablation.agreement_prompts) for task in tasks]
    return [item.prompt for group in zip(*items, strict=True) for item in group][: ablation.agreement_prompts]


def _generates(task: str) -> bool:
    return not take(task, "heldout", 1)[0].choices


def _linear_bytes(model: PreTrainedModel) -> float:
    """Bytes per weight of the layers recipes quantize, in a model that is not quantized."""
    weights: list[Tensor] = [module.get_parameter("weight") for _, module in adapter_for(model).linears(model)]
    return sum(weight.nbytes for weight in weights) / sum(weight.numel() for weight in weights)


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak starts anew from here
    except OSError:
        logger.debug("the peak memory of the process cannot be reset; it is that of all runs so far")


def _peak_memory(device: str) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_memory()


def _finished(run: PlannedRun, result: RunResult) -> str:
    if result.error is not None:
        return f"failed: {run.title}: {_last_line(result.error)}"
    scores = ", ".join(f"{task} {100 * score.accuracy:.1f}%" for task, score in result.scores.items())
    return f"finished: {run.title}: {scores} ({sum(result.seconds.values()):.1f} s)"


def _last_line(error: str) -> str:
    return error.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# The summary


@dataclass(frozen=True)
class Numbers:
    """A cell of one model in numbers, over its seeds.

    Attributes:
        n: Problems that are pooled; every one is answered once per seed.
        accuracy: By task, mean over seeds.
        pooled: Accuracy over the pooled tasks, mean over seeds.
        difference: Of the pooled accuracy to the original's, paired by problem; None without the original.
        recovered: Share of its baseline's loss that the cell recovers; None without one, or where there is no loss.
        same_text: Share of the pooled problems with exactly the original's text, mean over seeds.
        divergence_step: Median first step, from 1, that commits something else; None if half of the runs never do.
        never_diverges: Share of the prompts that never do.
        frontier_flips: Share of the original's states at which something else would be committed.
        token_flips: Share of the original's committed positions with another most likely token.
        kl: Nats per masked position, one for each of `BUCKETS`; None where it is empty.
        truncation_rate: Share of the pooled generations without an end, mean over seeds.
        forward_passes: Calls of the model on the pooled tasks, mean over seeds.
        bytes_per_weight: Bytes per weight of the quantized layers, mean over seeds.
        total_bytes: Bytes of all weights, mean over seeds.
        seconds: Wall time of all runs by phase.
        peak_memory_bytes: The largest of any run; None where the platform does not tell.
    """

    n: int
    accuracy: dict[str, float]
    pooled: float
    difference: PairedDifference | None
    recovered: RecoveredShare | None
    same_text: float | None
    divergence_step: float | None
    never_diverges: float
    frontier_flips: float
    token_flips: float
    kl: tuple[float | None, ...]
    truncation_rate: float
    forward_passes: float
    bytes_per_weight: float
    total_bytes: float
    seconds: dict[str, float]
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Row:
    """A cell of one model.

    Attributes:
        model: Name of the model.
        cell: Name of the cell.
        protocol: What is quantized at run time; empty for the model itself.
        summary: The recipe in a line; empty for the model itself.
        baseline: The cell whose loss is to be recovered, if any.
        seeds: Seeds that are measured.
        planned: Number of seeds planned.
        numbers: None when no seed is measured.
        errors: Last lines of the errors of the runs that failed.
    """

    model: str
    cell: str
    protocol: str
    summary: str
    baseline: str | None
    seeds: tuple[int, ...]
    planned: int
    numbers: Numbers | None
    errors: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Two cells on the same problems.

    Attributes:
        model: Name of the model; "all models" when they are pooled, problem by problem.
        first: The cell that a positive difference speaks for.
        second: The other cell.
        runs: Runs of first and of second.
        difference: Accuracy of first minus that of second.
    """

    model: str
    first: str
    second: str
    runs: tuple[int, int]
    difference: PairedDifference


@dataclass(frozen=True)
class Summary:
    """The results of an ablation, as far as there are any.

    Attributes:
        rows: By model and cell, the model itself first.
        comparisons: In the order asked for, model by model, then all models.
        finished: Runs that are measured.
        planned: All runs.
        code: Versions of the code that measured them, in the order of the runs.
    """

    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    finished: int
    planned: int
    code: tuple[str, ...]


ALL_MODELS = "all models"


def summarize(plan: AblationPlan, results: Mapping[PlannedRun, RunResult]) -> Summary:
    """Turns results into numbers; the same results always give the same numbers.

    Args:
        plan: The plan.
        results: Results of some of its runs, including failures.
    """
    good: dict[tuple[str, str], list[RunResult]] = {}
    rows = []
    for run in plan.runs:
        if run in results and results[run].error is None:
            good.setdefault((run.model, run.cell), []).append(results[run])
    for (model, cell), runs in _by_cell(plan).items():
        done = good.get((model, cell), [])
        baseline = _baseline(plan.ablation, cell)
        recipe = runs[0].recipe
        errors = [results[run].error for run in runs if run in results]
        rows.append(
            Row(
                model=model,
                cell=cell,
                protocol="" if recipe is None else recipe.protocol,
                summary="" if recipe is None else recipe.summary(),
                baseline=baseline,
                seeds=tuple(result.seed for result in done),
                planned=len(runs),
                numbers=_numbers(done, good.get((model, REFERENCE), []), good.get((model, baseline or ""), []))
                if done
                else None,
                errors=tuple(_last_line(error) for error in errors if error is not None),
            )
        )
    finished = [result for runs in good.values() for result in runs]
    code = [f"{result.metadata['dllmquant']} ({result.metadata.get('git_sha') or 'no git'})" for result in finished]
    return Summary(
        tuple(rows), tuple(_comparisons(plan, good)), len(finished), len(plan.runs), tuple(dict.fromkeys(code))
    )


def _by_cell(plan: AblationPlan) -> dict[tuple[str, str], list[PlannedRun]]:
    grouped: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in plan.runs:
        grouped.setdefault((run.model, run.cell), []).append(run)
    return grouped


def _baseline(ablation: Ablation, cell: str) -> str | None:
    named = next((entry.baseline for entry in ablation.cells if entry.name == cell), None) or ablation.baseline
    return None if cell in (REFERENCE, named) else named


def _pooled(items: Sequence[ItemResult]) -> dict[tuple[str, str], ItemResult]:
    """The problems that are pooled: those answered by generating, if there are any."""
    generated = [item for item in items if item.steps > 0] or items
    return {(item.task, item.key): item for item in generated}


def _outcomes(results: Sequence[RunResult], order: Sequence[tuple[str, str]]) -> NDArray[np.bool_]:
    """Whether each problem is right in each run, [problems, runs]."""
    columns = [_pooled(result.items) for result in results]
    return np.array([[column[name].correct for column in columns] for name in order], dtype=np.bool_)


def _numbers(done: Sequence[RunResult], reference: Sequence[RunResult], baseline: Sequence[RunResult]) -> Numbers:
    order = list(_pooled(done[0].items))
    right = _outcomes(done, order)
    difference, recovered, same = None, None, None
    if reference:
        full = _outcomes(reference, order)
        difference = paired_difference_clustered(full, right)
        texts = _pooled(reference[0].items)
        equal = [item.completion == texts[name].completion for run in done for name, item in _pooled(run.items).items()]
        same = sum(equal) / len(equal)
        if baseline:
            recovered = recovered_share(full, _outcomes(baseline, order), right)
    agreements = [result.agreement for result in done if result.agreement is not None]
    median, never = divergence_summary([step for each in agreements for step in each.first_divergence])
    frontiers = [each.frontier for each in agreements]
    tasks = {task for task, _ in order}
    return Numbers(
        n=len(order),
        accuracy={task: _mean([run.scores[task].accuracy for run in done]) for task in done[0].scores},
        pooled=float(right.mean()),
        difference=difference,
        recovered=recovered,
        same_text=same,
        divergence_step=median,
        never_diverges=never,
        frontier_flips=sum(each.flips for each in frontiers) / sum(each.states for each in frontiers),
        token_flips=sum(each.token_flips for each in frontiers) / sum(each.positions for each in frontiers),
        kl=tuple(_pooled_kl([each.kl[index] for each in agreements]) for index in range(len(BUCKETS))),
        truncation_rate=_mean([item.truncated for run in done for item in _pooled(run.items).values()]),
        forward_passes=_mean([sum(run.scores[task].forward_passes for task in tasks) for run in done]),
        bytes_per_weight=_mean([run.bytes_per_weight for run in done]),
        total_bytes=_mean([run.total_bytes for run in done]),
        seconds={phase: sum(run.seconds[phase] for run in done) for phase in done[0].seconds},
        peak_memory_bytes=max(run.metadata.get("peak_memory_bytes") or 0 for run in done) or None,
    )


def _pooled_kl(buckets: Sequence[KLBucket]) -> float | None:
    filled = [(bucket.mean, bucket.positions) for bucket in buckets if bucket.mean is not None]
    return sum(mean * count for mean, count in filled) / sum(count for _, count in filled) if filled else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _comparisons(plan: AblationPlan, good: Mapping[tuple[str, str], Sequence[RunResult]]) -> Iterator[Comparison]:
    """All pairs that have results; over all models only if each of them has all its seeds."""
    pairs = plan.ablation.compare or [(cell.name, REFERENCE) for cell in plan.ablation.cells]
    names = [model.name for model in plan.models]
    planned = _by_cell(plan)
    for first, second in pairs:
        arrays = []
        for model in names:
            runs = [good.get((model, cell), []) for cell in (first, second)]
            if not all(runs):
                continue
            order = list(_pooled(runs[0][0].items))
            answers = [_outcomes(each, order) for each in runs]
            yield Comparison(
                model, first, second, (len(runs[0]), len(runs[1])), paired_difference_clustered(answers[1], answers[0])
            )
            if all(len(each) == len(planned[model, cell]) for each, cell in zip(runs, (first, second), strict=True)):
                arrays.append(answers)
        if len(names) > 1 and len(arrays) == len(names):
            ours, theirs = (np.concatenate(columns, axis=1) for columns in zip(*arrays, strict=True))
            yield Comparison(
                ALL_MODELS,
                first,
                second,
                (ours.shape[1], theirs.shape[1]),
                paired_difference_clustered(theirs, ours),
            )


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def planned_text(plan: AblationPlan, output: Path) -> str:
    """Returns a table of the runs and whether each is done, for a terminal.

    Raises:
        ValueError: A result in the directory cannot be read.
    """
    rows = []
    for run in plan.runs:
        result = find_result(run, output)
        state = "to run" if result is None else "done" if result.error is None else "failed; to run again"
        rows.append([run.title, state, "the model itself" if run.recipe is None else run.recipe.summary()])
    waiting = sum(row[1] != "done" for row in rows)
    return f"{aligned(['run', 'state', 'recipe'], rows, left=3)}\n\n{len(rows)} runs, {waiting} of them to run"


def _write_tables(plan: AblationPlan, summary: Summary, output: Path) -> tuple[Path, ...]:
    """Writes results.json, results.csv and results.md."""
    numbers = {"name": plan.ablation.name, "ablation": plan.ablation.model_dump(mode="json"), **asdict(summary)}
    header, rows = _flat_table(plan.ablation, summary)
    contents = {
        "results.json": _json(numbers),
        "results.csv": comma_separated(header, rows),
        "results.md": _document(plan, summary),
    }
    for name, text in contents.items():
        _write(output / name, text)
    return tuple(output / name for name in contents)


def _draw(plan: AblationPlan, summary: Summary, path: Path) -> Path:
    differences: dict[str, dict[str, PairedDifference | None]] = {model.name: {} for model in plan.models}
    for row in summary.rows:
        if row.cell != REFERENCE:
            differences[row.model][row.cell] = None if row.numbers is None else row.numbers.difference
    return plot_differences(path, differences, reference=REFERENCE, title=plan.ablation.name)


def _document(plan: AblationPlan, summary: Summary) -> str:
    """The report in Markdown: no times in it, so equal results give equal documents."""
    ablation = plan.ablation
    parts = [f"# {ablation.name}"]
    if ablation.description:
        parts.append(ablation.description.strip())
    parts.append("\n".join(_facts(plan, summary)))
    parts += ["## Accuracy", markdown(*_accuracy_table(ablation, summary), left=3)]
    parts += ["## Fidelity and cost", markdown(*_fidelity_table(summary), left=2)]
    header, rows = _comparison_table(summary)
    parts += ["## Comparisons", markdown(header, rows, left=2) if rows else "None of the pairs has results yet."]
    failures = [f"- {_failure(row)}" for row in summary.rows if row.errors]
    if failures:
        parts += ["## Failed runs", "\n".join(failures)]
    return "\n\n".join(parts) + "\n"


def _facts(plan: AblationPlan, summary: Summary) -> list[str]:
    ablation = plan.ablation
    models = [
        model.name
        if model.stress is None
        else f"{model.name} (outliers planted: {model.stress.channels} channels × {model.stress.gain:g})"
        for model in plan.models
    ]
    pooled = [task for task in ablation.tasks if _generates(task)] or list(ablation.tasks)
    facts = [
        f"- Models: {', '.join(models)}.",
        f"- {ablation.limit} held-out problems of each of {', '.join(ablation.tasks)}. `pooled` is "
        f"{' + '.join(pooled)}, n = {ablation.limit * len(pooled)}"
        + (", generated by the model's own sampler." if _generates(pooled[0]) else ", chosen by likelihood."),
        "- Differences are in percentage points, paired by problem, with 95% bootstrap intervals over problems (all "
        "seeds and models of a problem together) and p-values of the exact sign-flip test, which is McNemar's with one "
        "run on either side.",
        f"- `{REFERENCE}` is the model itself, in the type of its checkpoint. `recovered` is the share of the "
        "baseline's loss that a cell recovers; `-` where the loss is not significant.",
        f"- Same text: share of the pooled problems. The other fidelity columns are measured on "
        f"{ablation.agreement_prompts} prompts: free running (`parts at step`: median first step that commits "
        f"something else; `never parts`) and on the states of {REFERENCE} (`flips`: states at which something else "
        "would be committed; KL in nats per masked token, by the masked share of the generation).",
        f"- {summary.finished} of {summary.planned} runs are finished.",
    ]
    if summary.code:
        facts.append(f"- Measured by dllmquant {', '.join(summary.code)}.")
    return facts


def _accuracy_table(ablation: Ablation, summary: Summary) -> tuple[list[str], list[list[str]]]:
    header = ["model", "cell", "protocol", "seeds", "n", *ablation.tasks, "pooled", f"vs {REFERENCE} (95%)", "p"]
    baselines = [row.baseline for row in summary.rows if row.baseline is not None]
    if baselines:
        header += ["baseline", "recovered (95%)"]
    rows = []
    for row in summary.rows:
        cells = [row.model, row.cell, row.protocol or "-", _seeds(row)]
        numbers = row.numbers
        if numbers is None:
            state = "failed" if row.errors else "not run"
            rows.append([*cells, state, *["-"] * (len(header) - len(cells) - 1)])
            continue
        cells += [str(numbers.n), *(_percent(numbers.accuracy[task]) for task in ablation.tasks)]
        cells.append(_percent(numbers.pooled))
        own = row.cell == REFERENCE or numbers.difference is None
        cells += ["-", "-"] if own or numbers.difference is None else [_points(numbers.difference), _p(numbers)]
        if baselines:
            cells += [row.baseline or "-", _recovered(numbers.recovered)]
        rows.append(cells)
    return header, rows


def _fidelity_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    header = ["model", "cell", "same text", "parts at step", "never parts", "flips"]
    header += [f"KL {low:g}-{high:g}" for low, high in BUCKETS]
    header += ["truncated", "forward passes", "bytes/weight", "total bytes"]
    rows = []
    for row in summary.rows:
        numbers = row.numbers
        if numbers is None:
            continue
        rows.append(
            [
                row.model,
                row.cell,
                "-" if numbers.same_text is None else _percent(numbers.same_text),
                "-" if numbers.divergence_step is None else f"{numbers.divergence_step:g}",
                _percent(numbers.never_diverges),
                _percent(numbers.frontier_flips),
                *("-" if kl is None else f"{kl:.3g}" for kl in numbers.kl),
                _percent(numbers.truncation_rate),
                f"{numbers.forward_passes:g}",
                f"{numbers.bytes_per_weight:.3f}",
                f"{numbers.total_bytes:,.0f}",
            ]
        )
    return header, rows


def _comparison_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    header = ["model", "comparison", "n", "runs", "difference (95%)", "only first", "only second", "p"]
    rows = [
        [
            each.model,
            f"{each.first} − {each.second}",
            str(each.difference.n),
            f"{each.runs[0]}, {each.runs[1]}",
            _points(each.difference),
            str(each.difference.only_b),
            str(each.difference.only_a),
            f"{each.difference.p_value:.2g}",
        ]
        for each in summary.comparisons
    ]
    return header, rows


def _flat_table(ablation: Ablation, summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Every number of every row, unrounded."""
    header = ["model", "cell", "protocol", "recipe", "seeds", "planned_seeds", "n"]
    header += [f"accuracy_{task}" for task in ablation.tasks]
    header += ["accuracy_pooled", "difference", "difference_low", "difference_high", "p_value"]
    header += ["baseline", "recovered", "recovered_low", "recovered_high"]
    header += ["same_text", "divergence_step", "never_diverges", "frontier_flips", "token_flips"]
    header += [f"kl_{low:g}_{high:g}" for low, high in BUCKETS]
    header += ["truncation_rate", "forward_passes", "bytes_per_weight", "total_bytes"]
    header += ["quantization_seconds", "evaluation_seconds", "agreement_seconds", "peak_memory_bytes", "errors"]
    rows = []
    for row in summary.rows:
        numbers = row.numbers
        values: list[object] = [row.model, row.cell, row.protocol, row.summary]
        values += [" ".join(map(str, row.seeds)), row.planned]
        if numbers is None:
            values += [None] * (len(header) - len(values) - 1)
        else:
            paired, share = numbers.difference, numbers.recovered
            values += [numbers.n, *(numbers.accuracy[task] for task in ablation.tasks), numbers.pooled]
            values += [None] * 4 if paired is None else [paired.difference, paired.low, paired.high, paired.p_value]
            values.append(row.baseline)
            values += [None] * 3 if share is None else [share.share, share.low, share.high]
            values += [numbers.same_text, numbers.divergence_step, numbers.never_diverges]
            values += [numbers.frontier_flips, numbers.token_flips, *numbers.kl, numbers.truncation_rate]
            values += [numbers.forward_passes, numbers.bytes_per_weight, numbers.total_bytes]
            values += [*numbers.seconds.values(), numbers.peak_memory_bytes]
        values.append("; ".join(row.errors))
        rows.append(["" if value is None else str(value) for value in values])
    return header, rows


def _seeds(row: Row) -> str:
    return str(len(row.seeds)) if len(row.seeds) == row.planned else f"{len(row.seeds)} of {row.planned}"


def _failure(row: Row) -> str:
    return f"failed: {row.model}/{row.cell}: {'; '.join(dict.fromkeys(row.errors))}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _points(paired: PairedDifference) -> str:
    return f"{100 * paired.difference:+.1f} [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"


def _p(numbers: Numbers) -> str:
    return "-" if numbers.difference is None else f"{numbers.difference.p_value:.2g}"


def _recovered(recovered: RecoveredShare | None) -> str:
    if recovered is None:
        return "-"
    return f"{100 * recovered.share:.0f}% [{100 * recovered.low:.0f}, {100 * recovered.high:.0f}]"


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    """Writes a file so that an interrupted write is never mistaken for one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as staging:
        partial = Path(staging) / path.name
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
