"""The sections of a recipe: what each setting means, and which values and combinations are valid."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, nothing changes once it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MixedPrecisionSettings(Section):
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


class WeightSettings(Section):
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
        correction: For GPTAQ and Qronos: how much of what earlier layers did to the input is made up for, from 0 (then
            both are GPTQ) to 1. GPTAQ's authors use 0.25.
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
    correction: float = Field(default=1.0, ge=0, le=1)
    inputs: Literal["exact", "quantized"] = "exact"

    @model_validator(mode="after")
    def _combination_is_possible(self) -> Self:
        if self.mixed is not None and (self.group_size is None or self.solver == "rtn"):
            raise ValueError("mixed: needs a group_size and a solver other than 'rtn', whose Hessian it reads")
        if self.clip == "awq" and (self.solver != "rtn" or self.mixed is not None):
            raise ValueError("clip: 'awq' goes with solver 'rtn'; valid for other solvers: 'none', 'mse'")
        if self.solver == "rtn" and self.act_order:
            raise ValueError("act_order: True has no meaning for solver 'rtn'; valid: False, or another solver")
        if self.solver not in ("gptaq", "qronos") and self.correction != 1:
            raise ValueError(f"correction: {self.correction:g} has no meaning for solver {self.solver!r}; valid: 1")
        if self.solver == "rtn" and self.inputs != "exact":
            raise ValueError("inputs: solver 'rtn' sees no inputs; valid: 'exact', or another solver")
        return self


class AllocationSettings(Section):
    """IA-AQ's activation bits: some sites get more bits, within a mean.

    Attributes:
        high_bits: Bits of the sites that get more.
        mean_bits: The mean bits per activation value, never exceeded; over sites: an expert's counts like any other.
        objective: What a site's error is measured by: "output", the interaction-weighted error of the layers that read
            it; or "logits", the KL divergence of the model's predictions at masked positions.
        heads: Whether the attention output is divided into one unit per head, which has a scale of its own if there are
            no groups.
    """

    high_bits: Literal[4, 8] = 8
    mean_bits: float = Field(gt=0)
    objective: Literal["output", "logits"] = "output"
    heads: bool = False


class ActivationSettings(Section):
    """Dynamic quantization of the linear layers' inputs (the `linear` protocol).

    Attributes:
        bits: Bits per activation.
        group_size: Channels of a token that share a scale; None is one scale per token.
        symmetric: Whether the grid is symmetric about zero.
        full_range: Symmetric grids: whether the lowest code is used as well, as transformers does with exports to
            compressed-tensors; without, the step is that of vLLM's integer kernels.
        allocation: More bits for some sites (IA-AQ); None gives every site the same.
    """

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int | None = Field(default=None, ge=1)
    symmetric: bool = True
    full_range: bool = False
    allocation: AllocationSettings | None = None

    @model_validator(mode="after")
    def _full_range_is_of_symmetric_grids(self) -> Self:
        if self.full_range and not self.symmetric:
            raise ValueError("full_range: true with symmetric: false, whose range is always full; valid: false")
        return self

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


class AttentionSettings(Section):
    """Quantization inside the attention: softmax output and values (the protocol `linear+av`), queries and keys.

    Attributes:
        probs_bits: Bits of the softmax output; None keeps it.
        probs_grid: "uniform", "log2" (powers of two), "log_sqrt2" (powers of their root), or "search": the best.
        probs_range: Where the grid ends: at 1 or the searched end ("fixed"), at the largest probability of every "row",
            or "search": the better of both.
        value_bits: Bits of the values; None keeps them.
        value_granularity: What shares a value scale: a "token" of a head (dynamic), a "head" or a "channel" (static).
        query_key_bits: Bits of queries and keys, per token; None keeps them.
        rotate_query_key: Whether queries and keys are rotated after their position embedding (QuaRot's R3).
        search: Whether the static value scales and the softmax grid minimise the error of the attention output (IA-AQ);
            otherwise scales span the calibration states' range.
    """

    probs_bits: Literal[4, 8] | None = 4
    probs_grid: Literal["uniform", "log2", "log_sqrt2", "search"] = "uniform"
    probs_range: Literal["fixed", "row", "search"] = "fixed"
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
        for name, others in (("probs_grid", "'uniform', 'log2', 'log_sqrt2'"), ("probs_range", "'fixed', 'row'")):
            if getattr(self, name) == "search" and not self.search:
                raise ValueError(f"{name}: 'search' needs search: true; valid without it: {others}")
        if self.rotate_query_key and self.query_key_bits is None:
            raise ValueError(
                "rotate_query_key: true has no effect without query_key_bits; valid: false, or query_key_bits 4 or 8"
            )
        return self

    @property
    def needs_states(self) -> bool:
        """Whether anything is fitted on calibration states."""
        return self.search or self._has_static_values

    @property
    def weighs_tokens(self) -> bool:
        """Whether what is fitted depends on how much tokens count: anything searched, and not the largest of a row."""
        searches_probs = self.probs_bits is not None and (self.probs_grid == "search" or self.probs_range != "row")
        return self.search and (searches_probs or self._has_static_values)

    @property
    def _has_static_values(self) -> bool:
        return self.value_bits is not None and self.value_granularity != "token"


class CalibrationSettings(Section):
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
        min_expert_tokens: Mixture models: an expert that fewer tokens are routed to is starved. States are added until
            none is, at most `max_growth` times as many; what is starved then is rounded to nearest.
        max_growth: See `min_expert_tokens`.
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
    min_expert_tokens: int = Field(default=32, ge=1)
    max_growth: int = Field(default=4, ge=1)
    cache: str | None = None

    @field_validator("quotas")
    @classmethod
    def _quotas_are_shares(cls, quotas: tuple[float, ...]) -> tuple[float, ...]:
        if not quotas or min(quotas) < 0 or abs(sum(quotas) - 1) > 1e-6:
            raise ValueError("quotas must be non-negative and sum to 1")
        return quotas


class TokenWeightSettings(Section):
    """How much each calibration token counts, in every solver and search.

    Attributes:
        kind: "uniform" counts every token once; "cgq" weights tokens by w = (m + √c)², with m the base of the token's
            mask state and c its confidence; "cgq_text" does, but counts masked tokens behind the end of the text like
            unmasked ones; "frontier" favours tokens about to be committed; "interaction" weights a token, in every
            block, by the attention it receives there.
        masked_base: cgq: m of masked tokens.
        unmasked_base: cgq: m of tokens that are not masked.
        decoded_confidence: cgq: c of tokens that are not masked: "zero", or the "model"'s own probability.
        waiting_confidence: cgq: c of masked tokens that the next step cannot commit, because they lie in later blocks:
            the "model"'s own probability, or "zero", as the sampler has it for them.
        context: frontier: weight every token has.
        frontier: frontier: added to tokens about to be committed.
        reliability: frontier: added to masked tokens, times their confidence.
    """

    kind: Literal["uniform", "cgq", "cgq_text", "frontier", "interaction"] = "uniform"
    masked_base: float = Field(default=1.0, ge=0)
    unmasked_base: float = Field(default=0.7, ge=0)
    decoded_confidence: Literal["zero", "model"] = "zero"
    waiting_confidence: Literal["model", "zero"] = "model"
    context: float = Field(default=0.25, ge=0)
    frontier: float = Field(default=1.0, ge=0)
    reliability: float = Field(default=0.5, ge=0)

    @model_validator(mode="after")
    def _waiting_is_of_cgq(self) -> Self:
        if self.waiting_confidence == "zero" and self.kind not in ("cgq", "cgq_text"):
            raise ValueError(f"waiting_confidence: 'zero' has no meaning for kind {self.kind!r}; valid: 'model'")
        return self

    @property
    def leaves_out_tokens(self) -> bool:
        """Whether tokens that are not masked may have weight 0, so that nothing sees them."""
        if self.kind == "frontier":
            return self.context == 0
        return self.kind in ("cgq", "cgq_text") and self.unmasked_base == 0 and self.decoded_confidence == "zero"


class SmoothQuant(Section):
    """SmoothQuant: moves activation ranges into the weights, s = absmax(x)^alpha / absmax(W)^(1-alpha).

    Attributes:
        kind: "smoothquant".
        alpha: Migration strength.
        producers: What takes up the inverse of the scales: "norms", as published; or "all", linear layers as well (the
            up projection, and values that are not grouped), as in DuQuant.
    """

    kind: Literal["smoothquant"]
    alpha: float = Field(default=0.5, ge=0, le=1)
    producers: Literal["norms", "all"] = "norms"


class AWQ(Section):
    """AWQ: scales channels by mean(|x|)^beta, beta searched by the output error.

    Attributes:
        kind: "awq".
        grid_points: Values of beta tried.
        objective: Whether the error is that of the output of the "sub_block" (attention or feed-forward) or, which is
            quicker, that of the outputs of the layers ("layer") that read the scaled input.
        duo_scaling: Whether the weights' magnitudes enter the scales too, as in AutoAWQ.
    """

    kind: Literal["awq"]
    grid_points: int = Field(default=20, ge=2)
    objective: Literal["sub_block", "layer"] = "sub_block"
    duo_scaling: bool = False


class IAAQ(Section):
    """IA-AQ's input scales: channel scales, in closed form, of every input that a `hadamard` of the recipe rotates.

    Attributes:
        kind: "iaaq".
        interaction: Whether a token counts by the attention it receives, beside its token weight.
    """

    kind: Literal["iaaq"]
    interaction: bool = True


class QuaRot(Section):
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


class Hadamard(Section):
    """An online Hadamard rotation of linear layers' inputs.

    Attributes:
        kind: "hadamard".
        sites: First layer of each group of layers whose common input is rotated; None rotates every input.
        block_size: Channels rotated together; None takes the largest order that can be built.
    """

    kind: Literal["hadamard"]
    sites: tuple[str, ...] | None = None
    block_size: int | None = Field(default=None, ge=2)


class DuQuant(Section):
    """DuQuant: greedy block rotation, zigzag permutation, block rotation, of linear layers' inputs.

    Attributes:
        kind: "duquant".
        sites: As for `Hadamard`.
        block_size: Channels rotated together.
        steps: Greedy steps.
    """

    kind: Literal["duquant"]
    sites: tuple[str, ...] | None = None
    block_size: int = Field(default=128, ge=2)
    steps: int = Field(default=256, ge=1)


class WUSH(Section):
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


FoldedTransforms = QuaRot | SmoothQuant | AWQ | IAAQ
InputTransformSettings = Hadamard | DuQuant | WUSH
Transform = Annotated[SmoothQuant | AWQ | IAAQ | QuaRot | Hadamard | DuQuant | WUSH, Field(discriminator="kind")]
