"""The document of an ablation: models, cells, seeds, comparisons."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from dllmquant.tasks import TASKS, take

REFERENCE = "16-bit"
"""Name of the cell that is the model itself, in the type of its checkpoint."""
FORMAT_VERSION = 1
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"


class AblationError(ValueError):
    """An ablation that cannot be run: the message names the field, its value and what would be valid."""


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


def generates(task: str) -> bool:
    """Whether a task is answered by generating, not by choosing."""
    return not take(task, "heldout", 1)[0].choices
