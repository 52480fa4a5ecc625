"""Statistics of a layer's input that add up over batches."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What the tokens x̃_j a layer reads, of weights w_j > 0, tell a solver; means are E f = Σ_j w_j f_j / Σ_j w_j.

    Attributes:
        hessian: [in, in], E x̃ x̃ᵀ, symmetric and positive semidefinite.
        tokens: How many tokens, at least 1.
        cross: [in, in], E (x − x̃) x̃ᵀ with x_j the same token in the full-precision path (rows: x − x̃, columns: x̃), so
            that hessian + cross = E x x̃ᵀ; None where that path was not recorded.
    """

    hessian: Tensor
    tokens: int
    cross: Tensor | None = None


@dataclass(frozen=True, eq=False)
class InputMagnitudes:
    """How large the channels of a layer's input are, over tokens x_j of weights w_j > 0.

    Attributes:
        absmax: [in], max_j |x_j|.
        mean_abs: [in], Σ_j w_j |x_j| / Σ_j w_j.
        mean_square: [in], Σ_j w_j x_j² / Σ_j w_j.
    """

    absmax: Tensor
    mean_abs: Tensor
    mean_square: Tensor


def input_magnitudes(batches: Iterable[tuple[Tensor, Tensor]]) -> InputMagnitudes:
    """Returns the magnitudes of tokens x [..., features] with weights w ≥ 0 [...], given batch by batch.

    Computed in float32, or float64 if the tokens are. Tokens of weight 0 (padding) are excluded altogether.

    Raises:
        ValueError: A shape does not fit, a weight is negative, a weighted token is not finite, or no token has a
            positive weight.
    """
    absmax = total = squares = torch.zeros(())
    weight = 0.0
    for x, weights in batches:
        rows, w, _ = _weighted_rows(x, weights, torch.promote_types(x.dtype, torch.float32))
        if len(rows):
            magnitude = rows.abs()
            absmax = torch.maximum(absmax.to(rows), magnitude.amax(0))
            total = total.to(rows) + w @ magnitude
            squares = squares.to(rows) + w @ rows.square()
            weight += float(w.sum(dtype=torch.float64))
    if weight <= 0:
        raise ValueError("batches: hold no token with a positive weight")
    return InputMagnitudes(absmax, total / weight, squares / weight)


def _weighted_rows(x: Tensor, weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Checks tokens [..., features] and weights [...]; returns those of positive weight, and which they are, flat.

    Raises:
        ValueError: A shape does not fit, a weight is negative, or a weighted token is not finite.
    """
    if weights.shape != x.shape[:-1]:
        raise ValueError(f"weights: shape {tuple(weights.shape)}, expected {tuple(x.shape[:-1])}")
    w = weights.reshape(-1).to(x.device, dtype)
    if not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
        raise ValueError("weights: valid weights are finite and not negative")
    used = w > 0
    rows = x.reshape(-1, x.shape[-1])[used].to(dtype)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("x: a token with a positive weight holds NaN or infinity")
    return rows, w[used], used


class HessianAccumulator:
    """Accumulates H = Σ_j w_j x_j x_jᵀ over tokens x_j with weights w_j ≥ 0, and the other sums of `InputStatistics`.

    A token of weight 0 (padding) is excluded altogether. With all weights 1 this is GPTQ's Hessian up to the factor 2,
    which no solver depends on.

    Attributes:
        features: Width of the tokens.
        total_weight: Σ_j w_j.
        tokens: Number of tokens with a positive weight.
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        cross: bool = False,
    ) -> None:
        """Starts empty sums, kept in `dtype` (float32 or float64) on `device`; `cross` adds the one over two paths.

        Raises:
            ValueError: `dtype` is narrower than float32.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: {dtype} is too narrow for a sum; valid: torch.float32, torch.float64")
        self.features = features
        self.total_weight = 0.0
        self.tokens = 0
        self._sum = torch.zeros(features, features, device=device, dtype=dtype)
        self._cross = torch.zeros_like(self._sum) if cross else None

    def add(self, x: Tensor, weights: Tensor | None = None, full: Tensor | None = None) -> None:
        """Adds tokens x [..., features] with weights [...] (None: all 1).

        With `cross`, and only then: x are tokens of the quantized path, `full` the same in the full-precision path.

        Raises:
            ValueError: A shape does not fit, a weight is negative, a weighted token is not finite, or `full` is amiss.
        """
        if x.shape[-1] != self.features:
            raise ValueError(f"x: {x.shape[-1]} features, expected {self.features}")
        if weights is None:
            weights = torch.ones(x.shape[:-1], device=x.device)
        rows, w, used = _weighted_rows(x.to(self._sum.device), weights, self._sum.dtype)
        self._add_cross(rows, w, used, x.shape, full)
        if not len(rows):
            return
        rows = rows * w.sqrt()[:, None]
        self._sum.addmm_(rows.T, rows)
        self.total_weight += float(w.sum(dtype=torch.float64))
        self.tokens += len(rows)

    def _add_cross(self, rows: Tensor, w: Tensor, used: Tensor, shape: torch.Size, full: Tensor | None) -> None:
        """Adds Σ w (x − x̃) x̃ᵀ: x̃ the rows of positive weight w, x those of `full`; see `add` for what it raises."""
        if (self._cross is None) != (full is None):
            raise ValueError("full: the full-precision tokens go with cross=True; valid: both or neither")
        if self._cross is None or full is None:
            return
        if full.shape != shape:
            raise ValueError(f"full: shape {tuple(full.shape)}, expected {tuple(shape)}")
        deviation = full.reshape(-1, self.features).to(self._sum)[used] - rows
        if not bool(torch.isfinite(deviation).all()):
            raise ValueError("full: a token with a positive weight holds NaN or infinity")
        self._cross.addmm_((deviation * w[:, None]).T, rows)

    def merge(self, other: "HessianAccumulator") -> None:
        """Adds another accumulator's tokens to this one.

        Raises:
            ValueError: The widths differ, or only one of the two has a cross sum.
        """
        if other.features != self.features:
            raise ValueError(f"other: {other.features} features, expected {self.features}")
        if (other._cross is None) != (self._cross is None):
            raise ValueError("other: one accumulator has a cross sum, the other none; valid: both or neither")
        self._sum += other._sum.to(self._sum)
        if self._cross is not None and other._cross is not None:
            self._cross += other._cross.to(self._cross)
        self.total_weight += other.total_weight
        self.tokens += other.tokens

    def state_dict(self) -> dict[str, Tensor]:
        """Returns everything needed to go on later."""
        state = {
            "sum": self._sum.clone(),
            "total_weight": torch.tensor(self.total_weight, dtype=torch.float64),
            "tokens": torch.tensor(self.tokens),
        }
        return state if self._cross is None else state | {"cross": self._cross.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`'s result.

        Raises:
            ValueError: The state is of another width, or only one of the two has a cross sum.
        """
        if state["sum"].shape != self._sum.shape:
            raise ValueError(f"state: sum of shape {tuple(state['sum'].shape)}, expected {tuple(self._sum.shape)}")
        if ("cross" in state) != (self._cross is not None):
            raise ValueError("state: one of it and the accumulator has a cross sum; valid: both or neither")
        self._sum = state["sum"].to(self._sum, copy=True)
        if self._cross is not None:
            self._cross = state["cross"].to(self._cross, copy=True)
        self.total_weight = float(state["total_weight"])
        self.tokens = int(state["tokens"])

    def hessian(self) -> Tensor:
        """Returns the weighted mean Σ w x xᵀ / Σ w, [features, features].

        Raises:
            ValueError: No token with a positive weight was added.
        """
        if self.total_weight <= 0:
            raise ValueError("hessian: no token with a positive weight was added")
        return self._sum / self.total_weight

    def statistics(self) -> InputStatistics:
        """Returns all of it as weighted means.

        Raises:
            ValueError: No token with a positive weight was added.
        """
        return InputStatistics(
            hessian=self.hessian(),
            tokens=self.tokens,
            cross=None if self._cross is None else self._cross / self.total_weight,
        )
