"""IA-AQ, Interaction-Aware Activation Quantization (DLLMQuant, arXiv 2508.14090): attention decides what error costs.

Product 1, the scales of a static value quantizer, minimises the error of the attention output with the softmax
quantized as it will be (Ã = Deq(Q(A)), scale s = α·ŝ, ŝ = (max V − min V) / (2**b − 1) over the calibration states):

    L(α) = Σ_states Σ_i w_i ‖(Ã (V̂_α − V))_i‖² = Σ_states Tr(ΔVᵀ G ΔV),   G = Ãᵀ diag(w) Ã,   α ∈ {1.00, 0.98 ... 0.80}

The trace splits over heads, and inside a head over channels, so the best α per head or per channel is exact. Product 2,
the bits of the linear layers' inputs, weighs each token by the attention it receives: `interaction` and `SiteErrors`.
Product 3, ours, scales the channels of a linear layer's input in front of a rotation, tokens weighed in the same way:
`input_scales`.

Choices where the paper is silent, and one addition:
    1. The step of α is 0.02. Ties go to the larger α.
    2. α shrinks a range about its middle and zero points are integers, so v = 0 keeps its exact code.
    3. Every query row i counts with its token weight w_i (CGQ's, 0 on padding); the paper's objective has w = 1.
    4. The published objective leaves the softmax quantizer untreated. `dllmquant.core.softmax_search` chooses it on the
       same objective; it comes first, and Ã in L is what it chose.
    5. A token's interaction is normalised per sequence, so that it does not depend on how sequences are batched.
    6. The paper has nothing for the inputs of linear layers where all of them get the same bits. A rotation spreads
       outlier channels over all others, which 4 bits then drown; scales have to come before it.

Searches see attention as rows, one per (sequence, head) in any order and any number at a time, as
`dllmquant.nn.sdpa.AttentionInputs.probabilities` yields them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dllmquant.core.attention import output_error, quantize_values, value_grid

ALPHAS = tuple(1.0 - 0.02 * step for step in range(11))


def interaction(probabilities: Tensor, query_weights: Tensor, real: Tensor | None = None) -> Tensor:
    """Returns how much attention each token receives, relative to the mean of its sequence.

    I_k = mean_h Σ_i w_i A_hik, divided by its mean over the sequence's real tokens.

    Args:
        probabilities: A, float [..., heads, q, k].
        query_weights: w ≥ 0, float [..., q].
        real: bool [..., k], False on padding, which gets 0; None takes every token. Not the tokens of positive query
            weight: a query that does not count is a key that is read.

    Returns:
        Float [..., k], of mean 1 over real tokens; 0 throughout where they receive nothing.

    Raises:
        ValueError: A shape does not fit.
    """
    if query_weights.shape != probabilities.shape[:-3] + probabilities.shape[-2:-1]:
        raise ValueError(f"query_weights: shape {tuple(query_weights.shape)} does not fit {tuple(probabilities.shape)}")
    mass = torch.einsum("...hqk,...q->...k", probabilities, query_weights.to(probabilities))
    return normalised_interaction(mass, torch.ones_like(mass, dtype=torch.bool) if real is None else real)


def normalised_interaction(mass: Tensor, real: Tensor) -> Tensor:
    """Divides attention mass [..., k], summed over heads, by its mean over each sequence's real tokens (bool [..., k]).

    Raises:
        ValueError: The shapes differ.
    """
    if mass.shape != real.shape:
        raise ValueError(f"real: shape {tuple(real.shape)}, expected {tuple(mass.shape)}")
    kept = torch.where(real, mass, 0.0)
    mean = kept.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mean > 0, kept / mean.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)


class ValueRange:
    """Accumulates the least and greatest value per head, or per head and channel, over calibration states.

    Attributes:
        low: float32 [heads, 1 or channels]; +∞ before the first value.
        high: Likewise; −∞ before the first value.
    """

    def __init__(self, heads: int, channels: int = 1, device: torch.device | str | None = None) -> None:
        """Starts an empty range; `channels` is 1 for one range per head, else the width of a head."""
        self.low = torch.full((heads, channels), torch.inf, device=device)
        self.high = -self.low

    def add(self, values: Tensor, real: Tensor | None = None) -> None:
        """Adds V [batch, heads·r, k, channels], each head repeated r times in a row.

        Args:
            values: The values.
            real: bool [batch, k], False on padding, which is left out; None keeps every token.

        Raises:
            ValueError: A shape does not fit, or a value that is kept is not finite.
        """
        heads, channels = self.low.shape
        if values.ndim != 4 or values.shape[1] % heads or channels not in (1, values.shape[3]):
            raise ValueError(f"values: shape {tuple(values.shape)}; valid: [batch, {heads}·r, k, {channels} (1: any)]")
        rows = values.transpose(1, 2).flatten(0, 1) if real is None else values.transpose(1, 2)[real]
        if not len(rows):
            return
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("values: a value that is not padding is NaN or infinite")
        grouped = rows.float().unflatten(1, (heads, -1))
        axes = (0, 2, 3) if channels == 1 else (0, 2)
        self.low = torch.minimum(self.low, grouped.amin(axes).view(heads, channels))
        self.high = torch.maximum(self.high, grouped.amax(axes).view(heads, channels))

    def merge(self, other: "ValueRange") -> None:
        """Widens this range by another one.

        Raises:
            ValueError: The shapes differ.
        """
        if other.low.shape != self.low.shape:
            raise ValueError(f"other: range of shape {tuple(other.low.shape)}, expected {tuple(self.low.shape)}")
        self.low = torch.minimum(self.low, other.low.to(self.low))
        self.high = torch.maximum(self.high, other.high.to(self.high))


@dataclass(frozen=True, eq=False)
class ValueScales:
    """Static scales of a value quantizer: V ≈ (codes − zero)·scale.

    Attributes:
        scale: float32 [heads, 1 or channels], positive.
        zero: float32 of the same shape, integers.
        alpha: float64 of the same shape, the shrink ratio chosen.
        error: float64 of the same shape, L at `alpha`.
        full_range_error: float64 of the same shape, L at α = 1; never below `error`.
    """

    scale: Tensor
    zero: Tensor
    alpha: Tensor
    error: Tensor
    full_range_error: Tensor


class ValueScaleSearch:
    """The second pass: L(α) for every candidate α, summed over calibration states.

    Attributes:
        table: float64 [alphas, heads, 1 or channels], L so far.
    """

    def __init__(self, value_range: ValueRange, bits: int, alphas: Sequence[float] = ALPHAS) -> None:
        """Starts with zero error.

        Args:
            value_range: The first pass's result.
            bits: Bits per value.
            alphas: Candidates, 1 first.

        Raises:
            ValueError: The range is empty or the candidates do not start with 1.
        """
        if not alphas or alphas[0] != 1:
            raise ValueError(f"alphas: {tuple(alphas)}; valid: ratios in (0, 1], the first of them 1")
        self.bits, self.alphas = bits, tuple(alphas)
        grids = [value_grid(value_range.low, value_range.high, bits, alpha) for alpha in alphas]
        self._scale, self._zero = (torch.stack(kind) for kind in zip(*grids, strict=True))
        self.table = torch.zeros_like(self._scale, dtype=torch.float64)

    def add(self, probabilities: Tensor, values: Tensor, heads: Tensor, weights: Tensor | None = None) -> None:
        """Adds rows, one per sequence and query head.

        Args:
            probabilities: Ã, float [n, q, k]: the softmax as it will be quantized.
            values: V of each row's value head, float [n, k, channels].
            heads: int64 [n], the value head of each row; several query heads may share one.
            weights: w ≥ 0, float [n, q]; None counts every query once.

        Raises:
            ValueError: The weights do not fit.
        """
        self._add(values, heads, lambda delta: output_error(probabilities, delta, weights))

    def add_gram(self, gram: Tensor, values: Tensor, heads: Tensor) -> None:
        """Adds rows of which only G [n, k, k] is known (`dllmquant.core.attention.attention_gram`); else as `add`."""
        self._add(values, heads, lambda delta: ((gram @ delta) * delta).sum(1, dtype=torch.float64))

    def _add(self, values: Tensor, heads: Tensor, errors: Callable[[Tensor], Tensor]) -> None:
        for scale, zero, total in zip(self._scale, self._zero, self.table, strict=True):
            error = errors(quantize_values(values, scale[heads][:, None], zero[heads][:, None], self.bits) - values)
            total.index_add_(0, heads, error.sum(1, keepdim=True) if total.shape[1] == 1 else error)

    def merge(self, other: "ValueScaleSearch") -> None:
        """Adds another search's errors to this one's.

        Raises:
            ValueError: The other one searches other scales.
        """
        same = self.bits == other.bits and torch.equal(self._scale, other._scale.to(self._scale))
        if not same or not torch.equal(self._zero, other._zero.to(self._zero)):
            raise ValueError("other: it searches other scales; valid: the same range, bits and alphas")
        self.table += other.table.to(self.table)

    def result(self) -> ValueScales:
        """Returns the scales with the least error."""
        best = self.table.argmin(0, keepdim=True)  # the first minimum, so ties go to the largest α
        scale, zero, error = (table.gather(0, best)[0] for table in (self._scale, self._zero, self.table))
        alpha = self.table.new_tensor(self.alphas)[best[0]]
        return ValueScales(scale, zero, alpha, error, self.table[0].clone())


def search_value_scales(
    states: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    bits: int,
    granularity: Literal["head", "channel"],
    alphas: Sequence[float] = ALPHAS,
) -> ValueScales:
    """Runs both passes of product 1 over states held in memory.

    Args:
        states: Per state Ã [heads, q, k], V [kv heads, k, channels] and w [q] or None.
        bits: Bits per value.
        granularity: One scale per value head, or per head and channel.
        alphas: Candidates, 1 first.

    Raises:
        ValueError: There is no state, the granularity is unknown, or a shape does not fit.
    """
    if not states or granularity not in ("head", "channel"):
        raise ValueError(f"states, granularity: {len(states)}, {granularity!r}; valid: 1 or more, head or channel")
    kv_heads, _, channels = states[0][1].shape
    value_range = ValueRange(kv_heads, 1 if granularity == "head" else channels, states[0][1].device)
    for _, values, _ in states:
        value_range.add(values[None])
    search = ValueScaleSearch(value_range, bits, alphas)
    for probabilities, values, weights in states:
        heads = torch.arange(len(probabilities), device=values.device) // (len(probabilities) // kv_heads)
        rows = None if weights is None else weights.expand(len(probabilities), -1)
        search.add(probabilities, values[heads], heads, rows)
    return search.result()


def input_scales(mean_square: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Returns the channel scales s of an input that is rotated before it is quantized (product 3), in closed form.

    With a Hadamard matrix H, layers read (x / s) H through W diag(s) H. Rounding the rotated token with a step in
    proportion to its length leaves an error that all channels share, E_j ∝ ‖x_j / s‖², which reaches the outputs times
    ‖W diag(s) H‖² = ‖W diag(s)‖²; rounding the weights errs in proportion to the same product. So with
    a_i = Σ_j w_j x_ji² / Σ_j w_j and b_i = Σ_o W_oi², by Cauchy's inequality,

        L(s) = (Σ_i a_i / s_i²) (Σ_i b_i s_i²)  ≥  (Σ_i √(a_i b_i))²,        attained by s_i² ∝ √(a_i / b_i).

    It is the diagonal case of WUSH (arXiv 2512.00956), which, unlike a full matrix, folds into the layer before.

    Args:
        mean_square: a, float [in], not negative; w_j is the interaction of token j times its token weight.
        weights: W, float [out, in] each, of all layers that read the input.

    Returns:
        float64 [in], positive, √(max s · min s) = 1. Both a and b count as at least 1e-8 of the largest channel's.

    Raises:
        ValueError: A shape does not fit, or a number is negative or not finite.
    """
    if mean_square.ndim != 1 or not bool((torch.isfinite(mean_square) & (mean_square >= 0)).all()):
        raise ValueError(f"mean_square: shape {tuple(mean_square.shape)}; valid: one finite number each, none negative")
    if not weights or any(weight.ndim != 2 or weight.shape[1] != len(mean_square) for weight in weights):
        shapes = [tuple(weight.shape) for weight in weights]
        raise ValueError(f"weights: shapes {shapes}; valid: at least one, each [out, {len(mean_square)}]")
    b = torch.stack([weight.double().square().sum(0) for weight in weights]).sum(0)
    if not bool(torch.isfinite(b).all()):
        raise ValueError("weights: one holds NaN or infinity")
    a = mean_square.double()
    if not bool(a.any()) or not bool(b.any()):
        return torch.ones_like(a)  # nothing is computed from this input
    scales = (a.clamp(min=float(a.max()) * 1e-8) / b.clamp(min=float(b.max()) * 1e-8)) ** 0.25
    return scales / (scales.max() * scales.min()).sqrt()


class SiteErrors:
    """Relative output error of quantizing one input of linear layers, for several ways of quantizing it (product 2).

    For each choice b: Σ_j w_j ‖W (x_j − Q_b(x_j))‖² / Σ_j w_j ‖W x_j‖². With w_j the interaction of token j (times
    CGQ's weight, if wanted), it is the cost of giving this site b bits, from which an allocation chooses.
    """

    def __init__(self, weight: Tensor, quantizers: Sequence[Callable[[Tensor], Tensor]]) -> None:
        """Starts with zero error.

        Args:
            weight: W, float [out, in], stacked over all layers that read this input.
            quantizers: The choices Q_b, each mapping tokens [n, in] to rounded ones.
        """
        self._weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        self._quantizers = tuple(quantizers)
        self._errors = torch.zeros(len(self._quantizers), dtype=torch.float64, device=weight.device)
        self._signal = torch.zeros((), dtype=torch.float64, device=weight.device)

    def add(self, x: Tensor, weights: Tensor, chunk: int = 4096) -> None:
        """Adds tokens x [..., in] with weights w [...]; tokens of weight 0 (padding) are excluded altogether.

        Args:
            x: The tokens.
            weights: w, finite and not negative.
            chunk: Tokens at a time; does not change the result beyond rounding.

        Raises:
            ValueError: A shape does not fit, a weight is negative or not finite, or a weighted token is not finite.
        """
        if weights.shape != x.shape[:-1] or x.shape[-1] != self._weight.shape[1]:
            raise ValueError(
                f"x, weights: shapes {tuple(x.shape)}, {tuple(weights.shape)} do not fit W's "
                f"{self._weight.shape[1]} columns"
            )
        if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
            raise ValueError("weights: valid weights are finite and not negative")
        used = weights > 0
        tokens, kept = x[used], weights[used].double()
        if not bool(torch.isfinite(tokens).all()):
            raise ValueError("x: a token with a positive weight holds NaN or infinity")
        for rows, w in zip(tokens.split(chunk), kept.split(chunk), strict=True):
            self._signal += self._cost(rows.to(self._weight), w)
            for index, quantize in enumerate(self._quantizers):
                self._errors[index] += self._cost(rows.to(self._weight) - quantize(rows).to(self._weight), w)

    def _cost(self, rows: Tensor, weights: Tensor) -> Tensor:
        return (rows @ self._weight.T).square().sum(1, dtype=torch.float64) @ weights

    def merge(self, other: "SiteErrors") -> None:
        """Adds the tokens of another accumulator of the same site and choices."""
        self._errors += other._errors.to(self._errors)
        self._signal += other._signal.to(self._signal)

    def relative(self) -> Tensor:
        """Returns the relative error of every choice, float64 [choices].

        Raises:
            ValueError: Nothing with a positive weight and a non-zero output was added.
        """
        if not float(self._signal) > 0:
            raise ValueError("relative: no token with a positive weight and a non-zero output was added")
        return self._errors / self._signal
