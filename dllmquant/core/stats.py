"""Statistics of a layer's input that add up over batches."""

import torch
from torch import Tensor


class HessianAccumulator:
    """Accumulates H = Σ_j w_j x_j x_jᵀ over tokens x_j with weights w_j ≥ 0.

    A token of weight 0 (padding) is excluded altogether. With all weights 1 this is GPTQ's Hessian up to the factor 2,
    which no solver depends on.

    Attributes:
        features: Width of the tokens.
        total_weight: Σ_j w_j.
        tokens: Number of tokens with a positive weight.
    """

    def __init__(
        self, features: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Starts an empty sum, kept in `dtype` (float32 or float64) on `device`.

        Raises:
            ValueError: `dtype` is narrower than float32.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: {dtype} is too narrow for a sum; valid: torch.float32, torch.float64")
        self.features = features
        self.total_weight = 0.0
        self.tokens = 0
        self._sum = torch.zeros(features, features, device=device, dtype=dtype)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Adds tokens x [..., features] with weights [...] (None: all 1).

        Raises:
            ValueError: A shape does not fit, a weight is negative, or a weighted token is not finite.
        """
        if x.shape[-1] != self.features:
            raise ValueError(f"x: {x.shape[-1]} features, expected {self.features}")
        rows = x.reshape(-1, self.features).to(self._sum)
        if weights is None:
            weights = torch.ones(x.shape[:-1], device=x.device)
        if weights.shape != x.shape[:-1]:
            raise ValueError(f"weights: shape {tuple(weights.shape)}, expected {tuple(x.shape[:-1])}")
        w = weights.reshape(-1).to(self._sum)
        if not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
            raise ValueError("weights: valid weights are finite and not negative")
        used = w > 0
        rows, w = rows[used], w[used]
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("x: a token with a positive weight holds NaN or infinity")
        rows = rows * w.sqrt()[:, None]
        self._sum.addmm_(rows.T, rows)
        self.total_weight += float(w.sum(dtype=torch.float64))
        self.tokens += int(used.sum())

    def merge(self, other: "HessianAccumulator") -> None:
        """Adds another accumulator's tokens to this one.

        Raises:
            ValueError: The widths differ.
        """
        if other.features != self.features:
            raise ValueError(f"other: {other.features} features, expected {self.features}")
        self._sum += other._sum.to(self._sum)
        self.total_weight += other.total_weight
        self.tokens += other.tokens

    def state_dict(self) -> dict[str, Tensor]:
        """Returns everything needed to go on later."""
        return {
            "sum": self._sum.clone(),
            "total_weight": torch.tensor(self.total_weight, dtype=torch.float64),
            "tokens": torch.tensor(self.tokens),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict`'s result.

        Raises:
            ValueError: The state is of another width.
        """
        if state["sum"].shape != self._sum.shape:
            raise ValueError(f"state: sum of shape {tuple(state['sum'].shape)}, expected {tuple(self._sum.shape)}")
        self._sum = state["sum"].to(self._sum, copy=True)
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
