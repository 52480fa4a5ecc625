"""Attention as models compute it: calls of `F.scaled_dot_product_attention`, intercepted without the model's help.

Only the function itself is intercepted. Attention computed otherwise (eager, flash-attn, flex attention, or inside
`nn.MultiheadAttention`) is not seen, and `capture_attention` says so.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dllmquant.core.iaaq import normalised_interaction

_CHUNK_ELEMENTS = 2**24  # probabilities held at a time: 64 MiB of float32
_CHUNK_ELEMENTS_CPU = 2**18  # on a CPU as many as stay in its cache


@dataclass(frozen=True, eq=False)
class AttentionChunk:
    """Some rows of an attention, one per sequence and query head.

    Attributes:
        batch: int64 [n], the sequence of each row.
        head: int64 [n], its query head.
        value_head: int64 [n], the value head it reads.
        probabilities: A, [n, q, k], float32 or wider.
        values: V of its value head, [n, k, channels], likewise.
    """

    batch: Tensor
    head: Tensor
    value_head: Tensor
    probabilities: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """The arguments of one attention call, softmax(scale · Q Kᵀ + mask) V.

    Attributes:
        query: [batch, heads, q, head_dim].
        key: [batch, key heads, k, head_dim]; query head h reads key head h // (heads / key heads).
        value: [batch, value heads, k, channels], read likewise.
        mask: None, bool (True = attended) or float (added to the scores), broadcastable to [batch, heads, q, k].
        scale: Factor of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float

    @classmethod
    def of_call(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> "AttentionInputs":
        """Reads the arguments of `F.scaled_dot_product_attention`; a causal call gets the mask it stands for.

        Raises:
            ValueError: The call drops out probabilities, has a mask and is causal, or its shapes do not fit.
        """
        if dropout_p:
            raise ValueError(f"dropout_p: {dropout_p}; valid: 0, attention is quantized in evaluation mode only")
        if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
            raise ValueError(
                f"query: {query.ndim} dimensions; valid: query, key and value [batch, heads, length, width]"
            )
        heads, groups = query.shape[1], {key.shape[1], value.shape[1]}
        if any(heads % group for group in groups) or not (enable_gqa or groups <= {1, heads}):
            raise ValueError(f"key, value: {sorted(groups)} heads; valid: {heads}, or with enable_gqa a divisor of it")
        if is_causal:
            if attn_mask is not None:
                raise ValueError("attn_mask: given although is_causal; valid: one of them")
            attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        return cls(query, key, value, attn_mask, query.shape[3] ** -0.5 if scale is None else scale)

    def probabilities(self, chunk: int | None = None) -> Iterator[AttentionChunk]:
        """Yields the attention, some rows at a time, sequence by sequence and head by head; it never exists as a whole.

        The softmax is computed in float32, or float64 for float64 inputs. A query that may attend to no key has
        probability 0 everywhere, so its output is 0, as PyTorch's is.

        Args:
            chunk: Rows at a time; None takes as many as fit in 64 MiB, or 1 MiB on a CPU. Does not change the
                probabilities.
        """
        batch, heads, length, _ = self.query.shape
        keys, wide = self.key.shape[2], torch.promote_types(self.query.dtype, torch.float32)
        if chunk is None:
            limit = _CHUNK_ELEMENTS_CPU if self.query.device.type == "cpu" else _CHUNK_ELEMENTS
            chunk = max(1, limit // (length * keys))
        query, key, value = (
            tensor.repeat_interleave(heads // tensor.shape[1], dim=1).flatten(0, 1)
            for tensor in (self.query, self.key, self.value)
        )
        if self.mask is not None:  # one matrix per row, but expanded: not copied
            mask = self.mask.broadcast_to(batch, heads, *(self.mask.shape[-2:] if self.mask.ndim > 1 else (1, keys)))
        for start in range(0, batch * heads, chunk):
            part = slice(start, start + chunk)
            rows = torch.arange(batch * heads, device=query.device)[part]
            item, head = rows // heads, rows % heads
            scores = query[part].to(wide) @ key[part].to(wide).transpose(1, 2) * self.scale
            if self.mask is not None:
                own = mask[item, head]
                hidden = ~own if own.dtype == torch.bool else own == -torch.inf
                scores = scores.masked_fill_(hidden, -torch.inf) if own.dtype == torch.bool else scores + own.to(wide)
                empty = hidden.broadcast_to(len(rows), hidden.shape[1], keys).all(-1, keepdim=True)
                probabilities = scores.softmax(-1).masked_fill_(empty, 0.0)
            else:
                probabilities = scores.softmax(-1)
            value_head = head // (heads // self.value.shape[1])
            yield AttentionChunk(item, head, value_head, probabilities, value[part].to(wide))

    def interaction(self, query_weights: Tensor, real: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """Returns `dllmquant.core.iaaq.interaction` of this call, [batch, k], chunk by chunk.

        Args:
            query_weights: w ≥ 0, float [batch, q].
            real: bool [batch, k], False on padding; None takes every token.
            chunk: See `probabilities`.
        """
        mass = torch.zeros(self.key.shape[0], self.key.shape[2], dtype=torch.float64, device=self.key.device)
        for part in self.probabilities(chunk):
            received = torch.einsum("nqk,nq->nk", part.probabilities, query_weights[part.batch].to(part.probabilities))
            mass.index_add_(0, part.batch, received.double())
        return normalised_interaction(mass, torch.ones_like(mass, dtype=torch.bool) if real is None else real)


class Interception(TorchFunctionMode):
    """While entered, `handle` gets the arguments of every attention call of this thread and answers it.

    Inside `handle` the interception is off, so it may call the function itself; interceptions nest, the innermost gets
    the call.

    Attributes:
        calls: Attention calls so far.
    """

    def __init__(self, handle: Callable[..., Tensor]) -> None:
        super().__init__()
        self._handle = handle
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._handle(*args, **(kwargs or {}))


@contextmanager
def watching_attention(watch: Callable[[AttentionInputs], None]) -> Iterator[None]:
    """While the context lasts, `watch` sees the inputs of every attention call; the call itself goes through.

    Calls that an installed `AttentionQuantizer` answers are not seen: it is the inner interception.
    """

    def handle(*args: Any, **kwargs: Any) -> Tensor:
        watch(AttentionInputs.of_call(*args, **kwargs))
        return F.scaled_dot_product_attention(*args, **kwargs)

    with Interception(handle):
        yield


def capture_attention(block: nn.Module, run: Callable[[], object]) -> AttentionInputs:
    """Returns the inputs of a block's attention call: the check that its attention can be quantized, and its shape.

    Args:
        block: The block; used in the error message only.
        run: Runs the block once.

    Raises:
        ValueError: The block made no attention call that can be intercepted, or several.
    """
    seen: list[AttentionInputs] = []
    with watching_attention(seen.append):
        run()
    if len(seen) != 1:
        raise ValueError(
            f"{type(block).__name__} called scaled_dot_product_attention {len(seen)} times, not once; quantizing its "
            "attention needs exactly one call (load the model with attn_implementation='sdpa')"
        )
    return seen[0]
