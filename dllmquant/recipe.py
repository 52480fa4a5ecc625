"""Recipes: the one validated, versioned document that says how a model is quantized."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from dllmquant.settings import (
    AWQ,
    IAAQ,
    WUSH,
    ActivationSettings,
    AllocationSettings,
    AttentionSettings,
    CalibrationSettings,
    DuQuant,
    Hadamard,
    InputTransformSettings,
    MixedPrecisionSettings,
    QuaRot,
    Section,
    SmoothQuant,
    TokenWeightSettings,
    Transform,
    WeightSettings,
)

_PACKAGE = Path(__file__).resolve().parent
# In a wheel the recipes lie inside the package, in a checkout beside it.
_RECIPE_DIRECTORIES = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")


class RecipeError(ValueError):
    """A recipe that cannot be used: the message names the field, its value and what would be valid."""


class Recipe(Section):
    """A complete quantization recipe; see `Recipe.load`.

    Attributes:
        version: Version of the recipe format.
        name: Name shown in reports.
        description: One sentence for people.
        weights: Grid and solver of the weights.
        activations: Activation quantization; None keeps 16-bit activations.
        attention: Quantization inside the attention; None keeps it in 16 bits.
        transforms: Function-preserving transforms applied before solving, in this order.
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
    attention: AttentionSettings | None = None
    transforms: tuple[Transform, ...] = ()
    calibration: CalibrationSettings | None = Field(default_factory=CalibrationSettings)
    token_weights: TokenWeightSettings = Field(default_factory=TokenWeightSettings)
    skip: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _combination_is_possible(self) -> Self:
        users = self._states_users()
        if self.calibration is None and users:
            raise ValueError(
                f"calibration: null, but {users[0]} needs calibration states; set calibration or change it"
            )
        if self.calibration is not None and not users:
            raise ValueError("calibration: nothing in this recipe uses data; set calibration to null")
        weighs_masks = self.token_weights.kind in ("cgq", "cgq_text", "frontier")
        if weighs_masks and self.calibration and self.calibration.states == "clean":
            raise ValueError(
                f"token_weights.kind: {self.token_weights.kind!r} weighs mask states, which calibration.states 'clean' "
                "does not have; valid: 'uniform', 'interaction', or other states"
            )
        if self.calibration is not None:
            self._states_and_weights_have_an_effect(self.calibration)
        if self.weights.inputs == "quantized" and self.activations is None:
            raise ValueError("weights.inputs: 'quantized', but activations is null; valid: 'exact', or set activations")
        self._transforms_fit_together()
        return self

    def _transforms_fit_together(self) -> None:
        """Refuses transforms in an order, or of inputs, that leaves one of them without its meaning."""
        claimed: set[str] = set()
        for transform in self.transforms:
            if isinstance(transform, InputTransformSettings):
                sites = {"*"} if transform.sites is None else set(transform.sites)
                if claimed & sites or (claimed and "*" in claimed | sites):
                    raise ValueError(
                        f"transforms: two of them at one input ({transform.kind}); give them disjoint sites"
                    )
                claimed |= sites
            elif claimed or (isinstance(transform, QuaRot) and transform is not self.transforms[0]):
                raise ValueError(
                    f"transforms: {transform.kind!r} comes too late; valid order: quarot, smoothquant, awq or iaaq, "
                    "then input transforms (hadamard, duquant, wush)"
                )
        kinds = [transform.kind for transform in self.transforms]
        if "iaaq" in kinds and "hadamard" not in kinds:
            raise ValueError("transforms: 'iaaq' scales inputs that a 'hadamard' rotates; add one, or use 'awq'")

    def _states_and_weights_have_an_effect(self, calibration: CalibrationSettings) -> None:
        """Refuses states that a setting sees nothing in, and token weights that nothing reads."""
        kind, allocation = self.token_weights.kind, None if self.activations is None else self.activations.allocation
        if kind == "cgq_text" and calibration.states in ("random_t", "mcs"):
            raise ValueError(
                f"token_weights.kind: 'cgq_text', but calibration.states {calibration.states!r} end with the text, so "
                "that it would be plain 'cgq'; valid: 'cgq', or states 'trajectory' or 'closed_loop'"
            )
        if self.token_weights.waiting_confidence == "zero" and calibration.states in ("random_t", "mcs"):
            raise ValueError(
                f"token_weights.waiting_confidence: 'zero', but calibration.states {calibration.states!r} have no "
                "blocks; valid: 'model', or states 'trajectory' or 'closed_loop'"
            )
        if calibration.states == "clean" and allocation is not None and allocation.objective == "logits":
            raise ValueError(
                "activations.allocation.objective: 'logits' measures masked positions, which calibration.states "
                "'clean' does not have; valid: 'output', or other states"
            )
        if kind != "uniform" and not self._reads_token_weights():
            readers = "weights.solver 'gptq', 'gptaq' or 'qronos', weights.clip 'awq', transform 'awq' or 'wush'"
            if kind != "interaction":
                readers += " or 'iaaq', activations.allocation"
            raise ValueError(
                f"token_weights.kind: {kind!r}, but nothing in this recipe reads token weights; valid: 'uniform', or "
                f"with one of {readers}, attention.search"
            )

    def _reads_token_weights(self) -> bool:
        """Whether the result depends on the token weights."""
        if self.weights.solver != "rtn" or self.weights.clip == "awq":
            return True
        if self.attention is not None and self.attention.weighs_tokens:
            return True
        if any(isinstance(transform, AWQ | WUSH) for transform in self.transforms):
            return True
        interacts = self.token_weights.kind == "interaction"  # by which some weigh tokens in any case
        if not interacts and self.activations is not None and self.activations.allocation is not None:
            return True
        if any(isinstance(t, IAAQ) and not (interacts and t.interaction) for t in self.transforms):
            return True
        # These read ranges and samples, of the tokens that count at all.
        ranges = any(isinstance(transform, SmoothQuant | DuQuant) for transform in self.transforms)
        return ranges and self.token_weights.leaves_out_tokens

    def _states_users(self) -> list[str]:
        """Names the settings that need calibration states, the token weights only if something else does."""
        users = []
        if self.weights.solver != "rtn":
            users.append(f"weights.solver {self.weights.solver!r}")
        if self.weights.clip == "awq":
            users.append("weights.clip 'awq'")
        if self.activations is not None and self.activations.allocation is not None:
            users.append("activations.allocation")
        if self.attention is not None and self.attention.needs_states:
            users.append("attention")
        fitted = SmoothQuant | AWQ | IAAQ | DuQuant | WUSH
        users += [f"transform {t.kind!r}" for t in self.transforms if isinstance(t, fitted)]
        if self.token_weights.kind != "uniform" and self.calibration is None:
            users.append(f"token_weights.kind {self.token_weights.kind!r}")
        return users

    @property
    def protocol(self) -> str:
        """What is quantized at run time, by its parts.

        "weights" (weights only) or "linear" (the inputs of linear layers too); then what the attention quantizes:
        "+av" the softmax output and the values, "+a" or "+v" one of them alone, "+qk" queries and keys. So "linear",
        "linear+av", "weights+v" or "linear+av+qk".
        """
        parts = ["weights" if self.activations is None else "linear"]
        if self.attention is not None:
            bits = {"a": self.attention.probs_bits, "v": self.attention.value_bits}
            parts.append("".join(name for name in bits if bits[name] is not None))
            parts.append("" if self.attention.query_key_bits is None else "qk")
        return "+".join(filter(None, parts))

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
        """Returns one line: bits, grouping, transforms, solver, states, token weights, protocol."""
        weights, activations = self.weights, self.activations
        parts = [
            f"W{weights.bits if weights.mixed is None else f'{weights.mixed.mean:g}'}"
            f"A{16 if activations is None else activations.bits}",
            f"weights per {'channel' if weights.group_size is None else f'group of {weights.group_size}'}",
        ]
        if weights.mixed is not None:
            parts.append(f"mixed {'/'.join(map(str, weights.mixed.choices))} bits")
        if activations is not None:
            grid = "" if activations.symmetric else "asymmetric "
            size = "token" if activations.group_size is None else f"group of {activations.group_size}"
            parts.append(f"{grid}activations per {size}")
            if activations.allocation is not None:
                allocation = activations.allocation
                parts.append(f"{allocation.high_bits} bits where it matters, mean {allocation.mean_bits:g}")
        parts += [transform.kind for transform in self.transforms]
        parts.append(weights.solver + ("" if weights.clip == "none" else f"+{weights.clip} clip"))
        if self.calibration is not None:
            parts.append(f"{self.calibration.states} states")
        if self.token_weights.kind != "uniform":
            parts.append(f"{self.token_weights.kind} token weights")
        if self.attention is not None:
            parts.append(f"attention quantized ({self.protocol})")
        return ", ".join(parts)


def _explain(error: Any) -> str:
    """Turns one pydantic error into "field: problem"."""
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{location}: unknown key; valid: {', '.join(_keys_at(error['loc'][:-1]))}"
    message: str = error["msg"].removeprefix("Value error, ")
    if not location:
        return message
    return f"{location}: {message} (got {error['input']!r})"


def _keys_at(location: tuple[str | int, ...]) -> list[str]:
    """Lists the keys a section may hold; `location` is pydantic's path to it."""
    section: type[BaseModel] = Recipe
    for part in location:
        if part in _TRANSFORMS:
            section = _TRANSFORMS[str(part)]
        elif part in section.model_fields:
            named = [kind for kind in _leaf_types(section.model_fields[str(part)].annotation) if kind in _SECTIONS]
            section = named[0] if named else section
    return list(section.model_fields)


def _leaf_types(annotation: Any) -> Iterator[Any]:
    """Yields the types in a union."""
    arguments = get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from _leaf_types(argument)


_SECTIONS = (
    WeightSettings,
    MixedPrecisionSettings,
    ActivationSettings,
    AllocationSettings,
    AttentionSettings,
    CalibrationSettings,
    TokenWeightSettings,
)
_TRANSFORMS: dict[str, type[BaseModel]] = {
    kind.model_fields["kind"].annotation.__args__[0]: kind  # type: ignore[union-attr]
    for kind in (SmoothQuant, AWQ, IAAQ, QuaRot, Hadamard, DuQuant, WUSH)
}


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
