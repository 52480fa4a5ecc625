"""Round to nearest: no data, no compensation."""

from torch import Tensor

from dllmquant.core.grid import Clip, Grid, QuantizedWeight, fit_scale, quantize_to_grid


def rtn(weight: Tensor, grid: Grid, *, clip: Clip = "none", importance: Tensor | None = None) -> QuantizedWeight:
    """Rounds a weight [out, in] to the nearest point of its grid.

    Args:
        weight: Float [out, in].
        grid: The grid.
        clip: How group ranges are fitted; see `fit_scale`.
        importance: Weights [in] of the clip search; see `fit_scale`.

    Raises:
        ValueError: As `fit_scale`.
    """
    scale, zero = fit_scale(weight, grid, clip=clip, importance=importance)
    return QuantizedWeight(grid, quantize_to_grid(weight, scale, zero, grid), scale, zero)
