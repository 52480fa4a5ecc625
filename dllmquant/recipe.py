"""Recipes: the one validated, versioned document that says how a model is quantized."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

_PACKAGE = Path(__file__).resolve().parent
# In a wheel the recipes lie inside the package, in a checkout beside it.
_RECIPE_DIRECTORIES = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")


class RecipeError(ValueError):
    """A recipe that cannot be used: the message names the field, its value and what would be valid."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MixedPrecisionSettings(_Section):
    """Mixed precision inside a weight: each group of columns gets its own width, within a strict mean.

    Attributes:
        choices: Widths to choose from.
        mean: The mean bits per weight of every layer, never exceeded; scales and zero points are not counted.
    """

    choices: tuple[Literal[1, 2, 3, 4, 8], ...] = (1, 2, 3)
    mean: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _mean_is_reachable(self) -> Self:
        if len(set(self.choices)) < 2 or list(self.choices) != sorted(set(self.choices)):
            raise ValueError(f"choices: {list(self.choices)}; valid: two or more widths, ascending")
        if not self.choices[0] <= self.mean <= self.choices[-1]:
            raise ValueError(f"mean: {self.mean:g}; valid: {self.choices[0]} to {self.choices[-1]}, the choices' range")
        return self


class WeightSettings(_Section):
    """The integer grid of the weights and the solver that rounds onto it.

    Attributes:
        bits: Bits per weight.
        group_size: Input channels that share a scale; None is one scale per output channel.
        symmetric: Whether the grid is symmetric about zero (no zero points are stored).
        mixed: Widths per group of columns instead of `bits` for all; None for one width.
        solver: "rtn" rounds to nearest; "gptq" compensates each column's error in the later ones; "gptaq" and "qronos"
            compensate the error of earlier layers as well, aiming at the full-precision output.
        clip: "mse" searches, per group, the range with the least squared error; "none" keeps the full range; "awq"
            searches the range with the least error of the group's output (solver "rtn" with calibration states).
        act_order: Not for RTN: solve columns in order of decreasing Hessian diagonal.
        damping: Not for RTN: added to the Hessian's diagonal, relative to its mean; escalated when that is too little.
        block_size: Not for RTN: columns per lazy update; changes speed, not results.
        inputs: Not for RTN: whether the solver sees the layer's inputs before ("exact") or after ("quantized") they are
            quantized, which lets it compensate some of the activations' error too.
    """

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(default=32, ge=1)
    symmetric: bool = False
    mixed: MixedPrecisionSettings | None = None
    solver: Literal["rtn", "gptq", "gptaq", "qronos"] = "gptq"
    clip: Literal["none", "mse", "awq"] = "none"
    act_order: bool = False
    damping: float = Field(default=0.01, gt=0, le=1)
    block_size: int = Field(default=128, ge=1)
    inputs: Literal["exact", "quantized"] = "exact"

    @model_validator(mode="after")
    def _combination_is_possible(self) -> Self:
        if self.mixed is not None and (self.group_size is None or self.solver == "rtn"):
            raise ValueError("mixed: needs a group_size and a solver other than 'rtn', whose Hessian it reads")
        if self.clip == "awq" and (self.solver != "rtn" or self.mixed is not None):
            raise ValueError("clip: 'awq' goes with solver 'rtn'; valid for other solvers: 'none', 'mse'")
        if self.solver == "rtn" and self.act_order:
            raise ValueError("act_order: True has no meaning for solver 'rtn'; valid: False, or another solver")
        if self.solver == "rtn" and self.inputs != "exact":
            raise ValueError("inputs: solver 'rtn' sees no inputs; valid: 'exact', or another solver")
        return self


class AllocationSettings(_Section):
    """IA-AQ's activation bits: some sites get more bits, within a mean.

    Attributes:
        high_bits: Bits of the sites that get more.
        mean_bits: The mean bits per activation value, never exceeded.
        objective: What a site's error is measured by: "output", the interaction-weighted error of the layers that read
            it; or "logits", the KL divergence of the model's predictions at masked positions.
        heads: Whether the attention output is divided into one unit per head.
    """

    high_bits: Literal[4, 8] = 8
    mean_bits: float = Field(gt=0)
    objective: Literal["output", "logits"] = "output"
    heads: bool = False


class ActivationSettings(_Section):
    """Dynamic quantization of the linear layers' inputs (the `linear` protocol).

    Attributes:
        bits: Bits per activation.
        group_size: Channels of a token that share a scale; None is one scale per token.
        symmetric: Whether the grid is symmetric about zero.
        allocation: More bits for some sites (IA-AQ); None gives every site the same.
    """

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(default=None, ge=1)
    symmetric: bool = True
    allocation: AllocationSettings | None = None

    @model_validator(mode="after")
    def _mean_is_reachable(self) -> Self:
        if self.allocation is not None:
            high, mean = self.allocation.high_bits, self.allocation.mean_bits
            if not self.bits < high or not self.bits <= mean <= high:
                raise ValueError(
                    f"allocation: mean_bits {mean:g} and high_bits {high}; valid: bits ({self.bits}) <= mean_bits <= "
                    "high_bits, and bits < high_bits"
                )
        return self


class AttentionSettings(_Section):
    """Quantization inside the attention (the `linear+av` protocol): softmax output and values, optionally queries/keys.

    Attributes:
        probs_bits: Bits of the softmax output; None keeps it.
        probs_grid: "uniform" from 0 to 1 or to the searched end, "log2" powers of two, "search" the better of both.
        value_bits: Bits of the values; None keeps them.
        value_granularity: What shares a value scale: a "token" of a head (dynamic), a "head" or a "channel" (static).
        query_key_bits: Bits of queries and keys, per token; None keeps them.
        rotate_query_key: Whether queries and keys are rotated after their position embedding (QuaRot's R3).
        search: Whether the static value scales and the end of the uniform softmax grid minimise the error of the
            attention output (IA-AQ); otherwise scales span the calibration states' range.
    """

    probs_bits: Literal[4, 8] | None = 4
    probs_grid: Literal["uniform", "log2", "search"] = "uniform"
    value_bits: Literal[4, 8] | None = 4
    value_granularity: Literal["token", "head", "channel"] = "token"
    query_key_bits: Literal[4, 8] | None = None
    rotate_query_key: bool = False
    search: bool = False

    @model_validator(mode="after")
    def _combination_is_possible(self) -> Self:
        if self.probs_bits is None and self.value_bits is None and self.query_key_bits is None:
            raise ValueError(
                "probs_bits, value_bits, query_key_bits: all null; quantize something or set attention: null"
            )
        if self.probs_grid == "search" and not self.search:
            raise ValueError("probs_grid: 'search' needs search: true; valid without it: 'uniform', 'log2'")
        return self

    @property
    def needs_states(self) -> bool:
        """Whether anything is fitted on calibration states."""
        return self.search or (self.value_bits is not None and self.value_granularity != "token")


class CalibrationSettings(_Section):
    """Where the calibration states come from.

    Attributes:
        states: "trajectory" takes states of real denoising runs (TMAS); "closed_loop" takes them, in a second pass, of
            the quantized model's own runs; "clean" takes prompt and completion without any mask, as quantizers for
            autoregressive models do; "random_t" masks completions at a uniformly random ratio; "mcs" keeps a visible
            prefix and masks the rest at stratified ratios (Quant-dLLM).
        num_states: Sequences that enter the statistics.
        num_prompts: Prompts that are decoded (trajectory and closed_loop only); each yields many states.
        quotas: Share of the states taken from each equal segment of the trajectory, first to last (TMAS).
        mask_ratio_buckets: Equal mask-ratio intervals of the coverage report.
        visible_prefix: Share of the sequence that mcs leaves visible.
        sampler: Sampler settings that replace the checkpoint's own while recording.
        batch_size: Sequences per forward pass.
        cache: Directory of recorded trajectories to reuse; "default" is one in the Hugging Face cache; None reuses
            nothing.
    """

    states: Literal["trajectory", "closed_loop", "clean", "random_t", "mcs"] = "trajectory"
    num_states: int = Field(default=128, ge=1)
    num_prompts: int = Field(default=64, ge=1)
    quotas: tuple[float, ...] = (0.3, 0.2, 0.2, 0.3)
    mask_ratio_buckets: int = Field(default=4, ge=1)
    visible_prefix: float = Field(default=0.25, ge=0, lt=1)
    sampler: dict[str, int | float | bool | str | None] = Field(default_factory=dict)
    batch_size: int = Field(default=32, ge=1)
    cache: str | None = None

    @field_validator("quotas")
    @classmethod
    def _quotas_are_shares(cls, quotas: tuple[float, ...]) -> tuple[float, ...]:
        if not quotas or min(quotas) < 0 or abs(sum(quotas) - 1) > 1e-6:
            raise ValueError("quotas must be non-negative and sum to 1")
        return quotas


class TokenWeightSettings(_Section):
    """How much each calibration token counts, in every solver and search.

    Attributes:
        kind: "uniform" counts every token once; "cgq" weights tokens by w = (m + √c)², with m the base of the token's
            mask state and c its confidence; "frontier" favours tokens about to be committed; "interaction" weights a
            token, in every block, by the attention it receives there.
        masked_base: cgq: m of masked tokens.
        unmasked_base: cgq: m of tokens that are not masked.
        decoded_confidence: cgq: c of tokens that are not masked: "zero", or the "model"'s own probability.
        context: frontier: weight every token has.
        frontier: frontier: added to tokens about to be committed.
        reliability: frontier: added to masked tokens, times their confidence.
    """

    kind: Literal["uniform", "cgq", "frontier", "interaction"] = "uniform"
    masked_base: float = Field(default=1.0, ge=0)
    unmasked_base: float = Field(default=0.7, ge=0)
    decoded_confidence: Literal["zero", "model"] = "zero"
    context: float = Field(default=0.25, ge=0)
    frontier: float = Field(default=1.0, ge=0)
    reliability: float = Field(default=0.5, ge=0)


class SmoothQuant(_Section):
    """SmoothQuant: moves activation ranges into the weights, s = absmax(x)^alpha / absmax(W)^(1-alpha).

    Attributes:
        kind: "smoothquant".
        alpha: Migration strength.
    """

    kind: Literal["smoothquant"]
    alpha: float = Field(default=0.5, ge=0, le=1)


class AWQ(_Section):
    """AWQ: scales channels by mean(|x|)^beta, beta searched by the output error.

    Attributes:
        kind: "awq".
        grid_points: Values of beta tried.
    """

    kind: Literal["awq"]
    grid_points: int = Field(default=20, ge=2)


class QuaRot(_Section):
    """QuaRot: rotates the residual stream (R1) and the values of each head (R2) into the weights.

    R3 is `attention.rotate_query_key`, R4 a `hadamard` transform at the down projection's input.

    Attributes:
        kind: "quarot".
        residual: Whether R1 is applied.
        values: Whether R2 is applied.
    """

    kind: Literal["quarot"]
    residual: bool = True
    values: bool = True


class Hadamard(_Section):
    """An online Hadamard rotation of linear layers' inputs.

    Attributes:
        kind: "hadamard".
        sites: First layer of each group of layers whose common input is rotated; None rotates every input.
        block_size: Channels rotated together; None takes the largest order that can be built.
    """

    kind: Literal["hadamard"]
    sites: tuple[str, ...] | None = None
    block_size: int | None = Field(default=None, ge=2)


class DuQuant(_Section):
    """DuQuant: greedy block rotation, zigzag permutation, block rotation, of linear layers' inputs.

    Attributes:
        kind: "duquant".
        sites: As for `Hadamard`.
        block_size: Channels rotated together.
        steps: Greedy steps.
    """

    kind: Literal["duquant"]
    sites: tuple[str, ...] | None = None
    block_size: int = Field(default=32, ge=2)
    steps: int = Field(default=256, ge=1)


class WUSH(_Section):
    """WUSH: closed-form block transform of linear layers' inputs, from the second moments of inputs and weights.

    Attributes:
        kind: "wush".
        sites: As for `Hadamard`.
        block_size: Channels transformed together.
        damping: Relative damping of the second moments.
    """

    kind: Literal["wush"]
    sites: tuple[str, ...] | None = None
    block_size: int = Field(default=32, ge=2)
    damping: float = Field(default=0.01, gt=0, le=1)


InputTransformSettings = Hadamard | DuQuant | WUSH
Transform = Annotated[SmoothQuant | AWQ | QuaRot | Hadamard | DuQuant | WUSH, Field(discriminator="kind")]


class Recipe(_Section):
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
        if self.token_weights.kind in ("cgq", "frontier") and self.calibration and self.calibration.states == "clean":
            raise ValueError(
                f"token_weights.kind: {self.token_weights.kind!r} weighs mask states, which calibration.states 'clean' "
                "does not have; valid: 'uniform', 'interaction', or other states"
            )
        if self.weights.inputs == "quantized" and self.activations is None:
            raise ValueError("weights.inputs: 'quantized', but activations is null; valid: 'exact', or set activations")
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
                    f"transforms: {transform.kind!r} comes too late; valid order: quarot, smoothquant or awq, then "
                    "input transforms (hadamard, duquant, wush)"
                )
        return self

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
        users += [f"transform {t.kind!r}" for t in self.transforms if isinstance(t, SmoothQuant | AWQ | DuQuant | WUSH)]
        if self.token_weights.kind != "uniform" and self.calibration is None:
            users.append(f"token_weights.kind {self.token_weights.kind!r}")
        return users

    @property
    def protocol(self) -> Literal["weights", "linear", "linear+av"]:
        """What is quantized at run time: weights only, linear inputs too, or softmax output and values as well."""
        if self.attention is not None:
            return "linear+av"
        return "weights" if self.activations is None else "linear"

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
            parts.append(f"activations per {'token' if activations.group_size is None else activations.group_size}")
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
            parts.append("attention quantized (linear+av)")
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
    for kind in (SmoothQuant, AWQ, QuaRot, Hadamard, DuQuant, WUSH)
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
