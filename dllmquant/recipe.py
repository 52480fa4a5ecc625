"""Recipes: the one validated, versioned document that says how a model is quantized."""

import copy
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

_PACKAGE = Path(__file__).resolve().parent
# In a wheel the recipes lie inside the package, in a checkout beside it.
_RECIPE_DIRECTORIES = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")


class RecipeError(ValueError):
    """A recipe that cannot be used: the message names the field, its value and what would be valid."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightSettings(_Section):
    """The integer grid of the weights and the solver that rounds onto it.

    Attributes:
        bits: Bits per weight.
        group_size: Input channels that share a scale; None is one scale per output channel.
        symmetric: Whether the grid is symmetric about zero (no zero points are stored).
        solver: "rtn" rounds to nearest; "gptq" compensates each column's error in the later ones.
        clip: "mse" searches, per group, the range with the least squared error; "none" keeps the full range.
        act_order: GPTQ only: solve columns in order of decreasing Hessian diagonal.
        damping: GPTQ only: added to the Hessian's diagonal, relative to its mean; escalated when that is too little.
        block_size: GPTQ only: columns per lazy update; changes speed, not results.
    """

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(default=32, ge=1)
    symmetric: bool = False
    solver: Literal["rtn", "gptq"] = "gptq"
    clip: Literal["none", "mse"] = "none"
    act_order: bool = False
    damping: float = Field(default=0.01, gt=0, le=1)
    block_size: int = Field(default=128, ge=1)


class ActivationSettings(_Section):
    """Dynamic quantization of the linear layers' inputs (the `linear` protocol).

    Attributes:
        bits: Bits per activation.
        group_size: Channels of a token that share a scale; None is one scale per token.
        symmetric: Whether the grid is symmetric about zero.
    """

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(default=None, ge=1)
    symmetric: bool = True


class CalibrationSettings(_Section):
    """Where the calibration states come from.

    Attributes:
        states: "trajectory" takes states of real denoising runs (TMAS); "clean" takes prompt and completion without
            any mask, as quantizers for autoregressive models do.
        num_states: Sequences that enter the statistics.
        num_prompts: Prompts that are decoded (trajectory only); each yields many states.
        quotas: Share of the states taken from each equal segment of the trajectory, first to last (TMAS).
        sampler: Sampler settings that replace the checkpoint's own while recording.
        batch_size: Sequences per forward pass.
    """

    states: Literal["trajectory", "clean"] = "trajectory"
    num_states: int = Field(default=128, ge=1)
    num_prompts: int = Field(default=64, ge=1)
    quotas: tuple[float, ...] = (0.3, 0.2, 0.2, 0.3)
    sampler: dict[str, int | float | bool | str | None] = Field(default_factory=dict)
    batch_size: int = Field(default=32, ge=1)

    @field_validator("quotas")
    @classmethod
    def _quotas_are_shares(cls, quotas: tuple[float, ...]) -> tuple[float, ...]:
        if not quotas or min(quotas) < 0 or abs(sum(quotas) - 1) > 1e-6:
            raise ValueError("quotas must be non-negative and sum to 1")
        return quotas


class TokenWeightSettings(_Section):
    """How much each calibration token counts in the statistics.

    Attributes:
        kind: "cgq" weights tokens by w = (m + √c)², with m the base of the token's mask state and c its confidence;
            "uniform" counts every token once.
        masked_base: m of masked tokens.
        unmasked_base: m of tokens that are not masked.
        decoded_confidence: c of tokens that are not masked: "zero", or the "model"'s own probability.
    """

    kind: Literal["uniform", "cgq"] = "uniform"
    masked_base: float = Field(default=1.0, ge=0)
    unmasked_base: float = Field(default=0.7, ge=0)
    decoded_confidence: Literal["zero", "model"] = "zero"


class Recipe(_Section):
    """A complete quantization recipe; see `Recipe.load`.

    Attributes:
        version: Version of the recipe format.
        name: Name shown in reports.
        description: One sentence for people.
        weights: Grid and solver of the weights.
        activations: Activation quantization; None keeps 16-bit activations.
        calibration: Calibration states; None for solvers that need no data.
        token_weights: Weights of the calibration tokens.
        skip: Full module paths, `*` standing for a block index, that stay in 16 bits. Each must match something.
        seed: Seed of prompts, sampling and state selection.
    """

    version: Literal[1] = 1
    name: str = Field(default="custom", min_length=1)
    description: str = ""
    weights: WeightSettings = Field(default_factory=WeightSettings)
    activations: ActivationSettings | None = None
    calibration: CalibrationSettings | None = Field(default_factory=CalibrationSettings)
    token_weights: TokenWeightSettings = Field(default_factory=TokenWeightSettings)
    skip: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _combination_is_possible(self) -> Self:
        if self.weights.solver == "gptq" and self.calibration is None:
            raise ValueError("weights.solver: 'gptq' needs calibration states; set calibration or use solver 'rtn'")
        if self.weights.solver == "rtn":
            if self.calibration is not None:
                raise ValueError("calibration: solver 'rtn' uses no data; set calibration to null or use solver 'gptq'")
            if self.weights.act_order:
                raise ValueError("weights.act_order: True has no meaning for solver 'rtn'; valid: False, or 'gptq'")
        if self.token_weights.kind == "cgq":
            if self.calibration is None:
                raise ValueError("token_weights.kind: 'cgq' needs calibration states; valid without them: 'uniform'")
            if self.calibration.states == "clean":
                raise ValueError(
                    "token_weights.kind: 'cgq' weighs mask states, which calibration.states 'clean' does not have; "
                    "valid: 'uniform', or states 'trajectory'"
                )
        return self

    @classmethod
    def load(cls, source: "Recipe | str | Path | dict[str, Any]") -> "Recipe":
        """Loads a recipe.

        Args:
            source: The name of a built-in recipe, the path of a YAML file, a dictionary, or a recipe.

        Raises:
            RecipeError: There is no such recipe, it is not valid YAML, a key is unknown, a value is out of range, or
                settings contradict each other.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, dict):
            return cls._validate(_resolve(source, Path(), ()), "recipe")
        path = _find(str(source), Path())
        document = _read(path)
        document.setdefault("name", path.stem)
        return cls._validate(_resolve(document, path.parent, (path,)), str(source))

    @classmethod
    def names(cls) -> list[str]:
        """Returns the names of the built-in recipes, sorted."""
        return sorted(path.stem for directory in _RECIPE_DIRECTORIES for path in directory.glob("*.yaml"))

    @classmethod
    def _validate(cls, document: dict[str, Any], origin: str) -> "Recipe":
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise RecipeError(f"{origin}: " + "; ".join(_explain(item) for item in error.errors())) from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as JSON-compatible values; `Recipe.load` restores it."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Returns the recipe as YAML, every setting spelled out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def summary(self) -> str:
        """Returns one line: bits, grouping, solver, states, token weights."""
        weights, activations = self.weights, self.activations
        parts = [
            f"W{weights.bits}A{16 if activations is None else activations.bits}",
            f"weights per {'channel' if weights.group_size is None else f'group of {weights.group_size}'}",
        ]
        if activations is not None:
            parts.append(f"activations per {'token' if activations.group_size is None else activations.group_size}")
        parts.append(weights.solver + ("+mse clip" if weights.clip == "mse" else ""))
        if self.calibration is not None:
            parts.append(f"{self.calibration.states} states")
        if self.token_weights.kind != "uniform":
            parts.append(f"{self.token_weights.kind} token weights")
        return ", ".join(parts)


def _explain(error: Any) -> str:
    """Turns one pydantic error into "field: problem"."""
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in error["loc"][:-1]:
            section = {
                "weights": WeightSettings,
                "activations": ActivationSettings,
                "calibration": CalibrationSettings,
                "token_weights": TokenWeightSettings,
            }[part]
        return f"{location}: unknown key; valid: {', '.join(section.model_fields)}"
    message: str = error["msg"].removeprefix("Value error, ")
    if not location:
        return message
    return f"{location}: {message} (got {error['input']!r})"


def _find(source: str, base: Path) -> Path:
    """Returns the file of a recipe given by path (with .yaml or .yml) or by built-in name."""
    if source.endswith((".yaml", ".yml")):
        path = base / Path(source).expanduser()
        if not path.is_file():
            raise RecipeError(f"recipe: no file {path}")
        return path
    for directory in _RECIPE_DIRECTORIES:
        path = directory / f"{source}.yaml"
        if path.is_file() and Path(source).name == source:
            return path
    raise RecipeError(
        f"recipe: unknown name {source!r}; built in: {', '.join(Recipe.names())}; or give the path of a .yaml file"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a YAML document: {error}") from None
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of settings, not {type(document).__name__}")
    return document


def _resolve(document: dict[str, Any], base: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Applies `extends`: the named recipe first, this document's settings over it, sections merged key by key."""
    document = copy.deepcopy(document)
    parent = document.pop("extends", None)
    if parent is None:
        return document
    if not isinstance(parent, str):
        raise RecipeError(f"extends: {parent!r} is not the name or the path of a recipe")
    path = _find(parent, base).resolve()
    if path in seen:
        raise RecipeError(f"extends: {' -> '.join(p.stem for p in (*seen, path))} is a circle")
    merged = _resolve(_read(path), path.parent, (*seen, path))
    for key, value in document.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merged[key] | value
        else:
            merged[key] = value
    return merged
