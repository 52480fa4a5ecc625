"""IA-AQ inside a block: the softmax and value quantizers are fitted to its attention and installed in it."""

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllmquant.capture import BlockCall
from dllmquant.core.attention import PROBS_GRIDS, quantize_probabilities
from dllmquant.core.iaaq import ALPHAS, ValueRange, ValueScales, ValueScaleSearch
from dllmquant.core.softmax_search import SoftmaxScales, SoftmaxSearch
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
    projection = block.get_submodule(adapter.value_output[0])
    channels = int(projection.out_features) // kv_heads  # type: ignore[arg-type] # nn.Linear or QuantLinear
    device = next(block.parameters()).device
    rows = _Rows(block, calls, weights, kv_heads)
    softmax = None
    if settings.search and settings.probs_bits is not None:
        softmax = _search_softmax(rows, settings, heads, device)
    scheme = AttentionScheme(
        settings.probs_bits,
        softmax.grid if softmax is not None else "log2" if settings.probs_grid == "log2" else "uniform",
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
    for what, found in (("value scales", values), ("softmax grid", softmax)):
        if found is not None:
            error, full = float(found.error.sum()), float(found.full_range_error.sum())
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


def _search_softmax(rows: _Rows, settings: AttentionSettings, heads: int, device: torch.device) -> SoftmaxScales:
    """Searches the upper ends of the softmax grid, and its kind if asked for."""
    assert settings.probs_bits is not None
    search = SoftmaxSearch(heads, settings.probs_bits, device=device)
    for chunk, _, query_weights in rows.chunks():
        search.add(chunk.probabilities, chunk.values, chunk.head, query_weights)
    if settings.probs_grid != "search":
        return search.result(settings.probs_grid)
    return min((search.result(grid) for grid in PROBS_GRIDS), key=lambda found: float(found.error.sum()))


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
    upper = torch.ones(1, device=chunk.probabilities.device) if softmax is None else softmax.upper[chunk.head]
    return quantize_probabilities(chunk.probabilities, upper.reshape(-1, 1, 1), scheme.probs_bits, scheme.probs_grid)
