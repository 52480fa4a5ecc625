"""IA-AQ inside a block: the softmax and value quantizers are fitted to its attention and installed in it."""

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllmquant.capture import BlockCall
from dllmquant.core.attention import PROBS_GRIDS, ProbsGrid, quantize_probabilities
from dllmquant.core.iaaq import ALPHAS, ValueRange, ValueScales, ValueScaleSearch
from dllmquant.core.softmax_search import PROBS_RANGES, ProbsRange, SoftmaxScales, SoftmaxSearch, row_ends
from dllmquant.models import ModelAdapter
from dllmquant.nn.attention import AttentionQuantizer, AttentionScheme, install
from dllmquant.nn.sdpa import AttentionChunk, AttentionInputs, capture_attention
from dllmquant.settings import AttentionSettings

logger = logging.getLogger(__name__)


def fit_attention(
    model: PreTrainedModel,
    block: nn.Module,
    adapter: ModelAdapter,
    settings: AttentionSettings,
    calls: Sequence[BlockCall],
    weights: Sequence[Tensor],
) -> None:
    """Fits a block's attention quantizer to its calls, with queries, keys and values as they are now, and installs it.

    Args:
        model: The model.
        block: Its block.
        adapter: Its adapter; must name `heads` and `value_output`.
        settings: How the attention is quantized.
        calls: How the block is called, one call per batch of states; may be empty where nothing is fitted.
        weights: Per call, the token weights [batch, length]; 0 on padding.

    Raises:
        ValueError: The block does not call scaled-dot-product attention exactly once.
    """
    assert adapter.heads is not None
    assert adapter.value_output is not None
    heads, kv_heads = (int(getattr(model.config, key)) for key in adapter.heads)
    output = block.get_submodule(adapter.value_output[1])
    channels = int(output.in_features) // heads  # type: ignore[arg-type] # nn.Linear or QuantLinear
    device = next(block.parameters()).device
    rows = _Rows(block, calls, weights, kv_heads)
    softmax = None
    grids: tuple[ProbsGrid, ...] = PROBS_GRIDS if settings.probs_grid == "search" else (settings.probs_grid,)
    ranges: tuple[ProbsRange, ...] = PROBS_RANGES if settings.probs_range == "search" else (settings.probs_range,)
    if settings.search and settings.probs_bits is not None:
        search = SoftmaxSearch(heads, settings.probs_bits, device=device)
        for chunk, _, query_weights in rows.chunks():
            search.add(chunk.probabilities, chunk.values, chunk.head, query_weights)
        found = [search.result(grid, range_) for grid in grids for range_ in ranges]
        softmax = min(found, key=lambda kind: float(kind.error.sum()))
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
        values = _search_values(
            rows, scheme, softmax, ALPHAS if settings.search else (1.0,), ValueRange(*shape, device)
        )
    quantizer = AttentionQuantizer(scheme, heads, kv_heads, channels, device)
    quantizer.calibrate(values=values, softmax=softmax)
    install(block, quantizer)
    for what, result in (("value scales", values), ("softmax grid", softmax)):
        if result is not None:
            error, full = float(result.error.sum()), float(result.full_range_error.sum())
            logger.info("%s: attention output error %.3g, %.3g with the full range", what, error, full)


@dataclass(frozen=True)
class _Rows:
    """The attention of a block over all calls, some rows (sequence, head) at a time."""

    block: nn.Module
    calls: Sequence[BlockCall]
    weights: Sequence[Tensor]
    kv_heads: int

    def inputs(self) -> Iterator[tuple[AttentionInputs, Tensor]]:
        """Yields each call's attention inputs and token weights."""
        for call, token_weights in zip(self.calls, self.weights, strict=True):
            yield capture_attention(self.block, functools.partial(call.run, self.block)), token_weights

    def chunks(self) -> Iterator[tuple[AttentionChunk, Tensor, Tensor]]:
        """Yields rows with the index of their value head and the weights of their queries."""
        for inputs, token_weights in self.inputs():
            repeats = inputs.value.shape[1] // self.kv_heads
            for chunk in inputs.probabilities():
                yield chunk, chunk.value_head // repeats, token_weights[chunk.batch]


def _search_values(
    rows: _Rows, scheme: AttentionScheme, softmax: SoftmaxScales | None, alphas: Sequence[float], ranges: ValueRange
) -> ValueScales:
    """Searches the scales of static values, with the probabilities rounded as they will be."""
    assert scheme.value_bits is not None
    for inputs, token_weights in rows.inputs():
        ranges.add(inputs.value, token_weights > 0)
    search = ValueScaleSearch(ranges, scheme.value_bits, alphas)
    for chunk, value_heads, query_weights in rows.chunks():
        search.add(_rounded(chunk, scheme, softmax), chunk.values, value_heads, query_weights)
    return search.result()


def _rounded(chunk: AttentionChunk, scheme: AttentionScheme, softmax: SoftmaxScales | None) -> Tensor:
    """Returns the probabilities of a chunk as the block will have them."""
    if scheme.probs_bits is None:
        return chunk.probabilities
    if scheme.probs_range == "row":
        upper = row_ends(chunk.probabilities)
    elif softmax is None:
        upper = torch.ones(1, 1, 1, device=chunk.probabilities.device)
    else:
        upper = softmax.upper[chunk.head][:, None, None]
    return quantize_probabilities(chunk.probabilities, upper, scheme.probs_bits, scheme.probs_grid)
