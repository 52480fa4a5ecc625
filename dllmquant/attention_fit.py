"""IA-AQ inside a block: the softmax and value quantizers are fitted to its attention and installed in it."""

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllmquant.capture import BlockCall
from dllmquant.core.attention import PROBS_GRIDS, ProbsGrid, output_error, quantize_probabilities
from dllmquant.core.iaaq import ALPHAS, ValueRange, ValueScales, ValueScaleSearch
from dllmquant.core.softmax_search import PROBS_RANGES, ProbsRange, SoftmaxScales, SoftmaxSearch, row_ends
from dllmquant.models import ModelAdapter
from dllmquant.nn.attention import AttentionQuantizer, AttentionScheme, install, round_query_key
from dllmquant.nn.sdpa import AttentionChunk, AttentionInputs, capture_attention
from dllmquant.settings import AttentionSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionReport:
    """What fitting a block's attention found.

    Errors are weighted squared errors of the attention output over the calibration states, relative to its weighted
    square. Queries and keys are rounded in both, as they are at run time.

    Attributes:
        block: Full path.
        softmax: The error of every softmax quantizer that was tried, by its grid and range, such as "log2 row", on
            exact values; empty without a search.
        chosen: The one that was taken; None without a search.
        softmax_full_range: The error of its grid from 0 to 1; None without a search.
        values: The error of rounding static values, with the softmax as chosen; None where values are not static.
        values_full_range: Likewise with scales of the full range, α = 1.
    """

    block: str
    softmax: dict[str, float]
    chosen: str | None
    softmax_full_range: float | None
    values: float | None
    values_full_range: float | None


def fit_attention(
    model: PreTrainedModel,
    name: str,
    adapter: ModelAdapter,
    settings: AttentionSettings,
    calls: Sequence[BlockCall],
    weights: Sequence[Tensor],
    real: Sequence[Tensor],
) -> AttentionReport | None:
    """Fits a block's attention quantizer to its calls, with queries, keys and values as they are now, and installs it.

    Args:
        model: The model.
        name: Full path of the block.
        adapter: Its adapter; must name `heads` and `value_output`.
        settings: How the attention is quantized.
        calls: How the block is called, one call per batch of states; may be empty where nothing is fitted.
        weights: Per call, the token weights [batch, length]; 0 on padding.
        real: Per call, which tokens are not padding, bool [batch, length]; attention reads those of weight 0 too.

    Returns:
        What was found; None where nothing is fitted.

    Raises:
        ValueError: The block does not call scaled-dot-product attention exactly once.
    """
    assert adapter.heads is not None
    assert adapter.value_output is not None
    block = model.get_submodule(name)
    heads, kv_heads = (int(getattr(model.config, key)) for key in adapter.heads)
    output = block.get_submodule(adapter.value_output[1])
    channels = int(output.in_features) // heads  # type: ignore[arg-type] # nn.Linear or QuantLinear
    device = next(block.parameters()).device
    rows = _Rows(block, calls, weights, real, kv_heads, settings)
    softmax, tried, signal = None, [], 0.0
    grids: tuple[ProbsGrid, ...] = PROBS_GRIDS if settings.probs_grid == "search" else (settings.probs_grid,)
    ranges: tuple[ProbsRange, ...] = PROBS_RANGES if settings.probs_range == "search" else (settings.probs_range,)
    if settings.search and settings.probs_bits is not None:
        search = SoftmaxSearch(heads, settings.probs_bits, device=device)
        signal = _search_softmax(rows, search)
        tried = [search.result(grid, range_) for grid in grids for range_ in ranges]
        softmax = min(tried, key=lambda kind: float(kind.error.sum()))
    scheme = AttentionScheme(
        settings.probs_bits,
        grids[0] if softmax is None else softmax.grid,
        ranges[0] if softmax is None else softmax.range,
        settings.value_bits,
        settings.value_granularity if settings.value_bits is not None else "token",
        settings.query_key_bits,
        settings.rotate_query_key,
    )
    values = None
    if scheme.has_static_values:
        shape = (kv_heads, channels if settings.value_granularity == "channel" else 1)
        alphas = ALPHAS if settings.search else (1.0,)
        values, signal = _search_values(rows, scheme, softmax, alphas, ValueRange(*shape, device))
    quantizer = AttentionQuantizer(scheme, heads, kv_heads, channels, device)
    quantizer.calibrate(values=values, softmax=softmax)
    install(block, quantizer)
    if values is None and softmax is None:
        return None
    report = _report(name, tried, softmax, values, signal)
    for what, error, full in (
        ("value scales", report.values, report.values_full_range),
        (f"softmax grid {report.chosen}", report.softmax.get(report.chosen or ""), report.softmax_full_range),
    ):
        if error is not None:
            logger.info("%s: %s: attention output error %.3g, %.3g with the full range", name, what, error, full)
    return report


def _report(
    name: str, tried: Sequence[SoftmaxScales], softmax: SoftmaxScales | None, values: ValueScales | None, signal: float
) -> AttentionReport:
    def relative(error: Tensor) -> float:
        """The error as it is stored: six digits do not depend on the order in which a device adds."""
        return float(f"{float(error.sum()) / signal if signal > 0 else 0.0:.6g}")

    return AttentionReport(
        block=name,
        softmax={f"{kind.grid} {kind.range}": relative(kind.error) for kind in tried},
        chosen=None if softmax is None else f"{softmax.grid} {softmax.range}",
        softmax_full_range=None if softmax is None else relative(softmax.full_range_error),
        values=None if values is None else relative(values.error),
        values_full_range=None if values is None else relative(values.full_range_error),
    )


@dataclass(frozen=True)
class _Rows:
    """The attention of a block over all calls, some rows (sequence, head) at a time."""

    block: nn.Module
    calls: Sequence[BlockCall]
    weights: Sequence[Tensor]
    real: Sequence[Tensor]
    kv_heads: int
    settings: AttentionSettings

    def inputs(self) -> Iterator[AttentionInputs]:
        """Yields each call's attention inputs, queries and keys rounded as they will be."""
        for call in self.calls:
            seen = capture_attention(self.block, functools.partial(call.run, self.block))
            yield round_query_key(seen, self.settings.query_key_bits, rotate=self.settings.rotate_query_key)

    def chunks(self) -> Iterator[tuple[AttentionChunk, Tensor, Tensor]]:
        """Yields rows with the index of their value head and the weights of their queries."""
        for inputs, token_weights in zip(self.inputs(), self.weights, strict=True):
            repeats = inputs.value.shape[1] // self.kv_heads
            for chunk in inputs.probabilities():
                yield chunk, chunk.value_head // repeats, token_weights[chunk.batch]


def _search_softmax(rows: _Rows, search: SoftmaxSearch) -> float:
    """Adds all rows to a search; returns the weighted square of their outputs."""
    signal = 0.0
    for chunk, _, query_weights in rows.chunks():
        search.add(chunk.probabilities, chunk.values, chunk.head, query_weights)
        signal += _square(chunk, query_weights)
    return signal


def _search_values(
    rows: _Rows, scheme: AttentionScheme, softmax: SoftmaxScales | None, alphas: Sequence[float], ranges: ValueRange
) -> tuple[ValueScales, float]:
    """Searches the scales of static values, with the probabilities rounded as they will be.

    Returns:
        The scales, and the weighted square of the outputs.
    """
    assert scheme.value_bits is not None
    for inputs, real in zip(rows.inputs(), rows.real, strict=True):
        ranges.add(inputs.value, real)
    search, signal = ValueScaleSearch(ranges, scheme.value_bits, alphas), 0.0
    for chunk, value_heads, query_weights in rows.chunks():
        search.add(_rounded(chunk, scheme, softmax), chunk.values, value_heads, query_weights)
        signal += _square(chunk, query_weights)
    return search.result(), signal


def _square(chunk: AttentionChunk, query_weights: Tensor) -> float:
    """Returns Σ_i w_i ‖(A V)_i‖² over the rows of a chunk."""
    return float(output_error(chunk.probabilities, chunk.values, query_weights).sum())


def _rounded(chunk: AttentionChunk, scheme: AttentionScheme, softmax: SoftmaxScales | None) -> Tensor:
    """Returns the probabilities of a chunk, whose queries and keys are rounded already, as the block will have them."""
    if scheme.probs_bits is None:
        return chunk.probabilities
    if scheme.probs_range == "row":
        upper = row_ends(chunk.probabilities)
    elif softmax is None:
        upper = torch.ones(1, 1, 1, device=chunk.probabilities.device)
    else:
        upper = softmax.upper[chunk.head][:, None, None]
    return quantize_probabilities(chunk.probabilities, upper, scheme.probs_bits, scheme.probs_grid)
