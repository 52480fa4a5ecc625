"""Coverage: which parts of the denoising process calibration states come from.

States are counted in cells, trajectory segment × mask-ratio bucket. Segment q of Q holds the steps of progress
[q/Q, (q+1)/Q); with a time t from 1 (all noise) to 0, progress is 1 − t. Bucket b of B holds the mask ratios
(b/B, (b+1)/B], and the first one 0 as well. A schedule that commits evenly falls through the cells of the *diagonal*:
in segment q its ratio lies in (1 − (q+1)/Q, 1 − q/Q]. A cell of the diagonal without a state is a part of decoding
that the statistics never see; off the diagonal, empty cells are the rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Table = tuple[tuple[int, ...], ...]
"""Counts, [segments][buckets]."""

_TABLES = ("states", "masked_tokens", "unmasked_tokens", "recorded")
# Ratios are quotients of integers in float32: one that means an edge must not fall on its other side.
_EDGE = 1e-6


@dataclass(frozen=True)
class Coverage:
    """How many states, and tokens of them, each cell holds.

    Invariant: all tables are [segments][buckets] with counts of at least 0; where `recorded` is given, it is nowhere
    less than `states`.

    Attributes:
        states: Calibration states.
        masked_tokens: Their masked tokens.
        unmasked_tokens: Their other tokens, prompts included, padding not.
        recorded: The states they were selected from; None where states are drawn instead of selected.

    Raises:
        ValueError: On construction, if the tables are not as above.
    """

    states: Table
    masked_tokens: Table
    unmasked_tokens: Table
    recorded: Table | None = None

    def __post_init__(self) -> None:
        """Checks the invariant."""
        shape = _shape("states", self.states)
        for name in _TABLES[1:]:
            table = getattr(self, name)
            if table is not None and _shape(name, table) != shape:
                raise ValueError(f"{name}: shape {_shape(name, table)}; valid: that of states, {shape}")
        if self.recorded is not None and any(
            have < used
            for row, used_row in zip(self.recorded, self.states, strict=True)
            for have, used in zip(row, used_row, strict=True)
        ):
            raise ValueError(f"recorded: {self.recorded}; valid: in no cell fewer than the states, {self.states}")

    @property
    def segments(self) -> int:
        """Number of trajectory segments."""
        return len(self.states)

    @property
    def buckets(self) -> int:
        """Number of mask-ratio buckets."""
        return len(self.states[0])

    @property
    def diagonal(self) -> tuple[tuple[int, int], ...]:
        """The cells (segment, bucket) an even schedule passes through, in its order."""
        parts, buckets = self.segments, self.buckets
        return tuple(
            (segment, bucket)
            for segment in range(parts)
            for bucket in reversed(range(buckets))
            if bucket * parts < buckets * (parts - segment) and (bucket + 1) * parts > buckets * (parts - segment - 1)
        )

    @property
    def empty(self) -> tuple[tuple[int, int], ...]:
        """The cells (segment, bucket) without a state."""
        return tuple(
            (segment, bucket)
            for segment, row in enumerate(self.states)
            for bucket, count in enumerate(row)
            if count == 0
        )

    def notes(self, quotas: Sequence[float] | None = None) -> tuple[str, ...]:
        """Says which cells of the diagonal are empty, and whether more states could fill them.

        Args:
            quotas: Share of the states each segment was to give: segments of share 0 are empty on purpose. None
                expects states of every segment.

        Raises:
            ValueError: The number of quotas is not that of the segments.
        """
        if quotas is not None and len(quotas) != self.segments:
            raise ValueError(f"quotas: {len(quotas)} given; valid: {self.segments}, one for each segment")
        empty = set(self.empty)
        missing = [
            (segment, bucket)
            for segment, bucket in self.diagonal
            if (segment, bucket) in empty and (quotas is None or quotas[segment] > 0)
        ]
        if self.recorded is None:
            return _note("no state drawn lies in ", [self._cell(*cell) for cell in missing])
        kept = [cell for cell in missing if self.recorded[cell[0]][cell[1]]]
        return (
            *_note("no recorded state lies in ", [self._cell(*cell) for cell in missing if cell not in kept]),
            *_note(
                "recorded, but not selected, is ",
                [f"{self._cell(*cell)} ({self.recorded[cell[0]][cell[1]]} states)" for cell in kept],
            ),
        )

    def summary(self) -> str:
        """Returns the counts in one sentence."""
        filled = self.segments * self.buckets - len(self.empty)
        reached = sum(cell not in self.empty for cell in self.diagonal)
        return (
            f"{_total(self.states)} states, {_total(self.masked_tokens)} masked and {_total(self.unmasked_tokens)} "
            f"other tokens; {filled} of {self.segments * self.buckets} cells (segment × mask ratio) filled, "
            f"{reached} of {len(self.diagonal)} on the diagonal"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-compatible tables; `from_dict` restores them."""
        return {
            name: None if getattr(self, name) is None else [list(row) for row in getattr(self, name)]
            for name in _TABLES
        }

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Coverage":
        """Restores what `to_dict` returned.

        Raises:
            ValueError: A table is missing, unknown, or not as in `Coverage`.
        """
        if set(document) != set(_TABLES):
            raise ValueError(f"coverage: keys {sorted(document)}; valid: {', '.join(_TABLES)}")
        tables = {
            name: None if rows is None and name == "recorded" else _table(name, rows) for name, rows in document.items()
        }
        return cls(**tables)  # type: ignore[arg-type]

    def _cell(self, segment: int, bucket: int) -> str:
        low, high = (f"{100 * edge / self.buckets:.3g}" for edge in (bucket, bucket + 1))
        return f"segment {segment + 1} of {self.segments} with {low} to {high}% masked"


def bucket_of(mask_ratio: Tensor, buckets: int) -> Tensor:
    """Returns the bucket of every mask ratio, int64 of the same shape.

    Args:
        mask_ratio: Float, any shape, in [0, 1].
        buckets: B, at least 1.

    Raises:
        ValueError: A ratio lies outside [0, 1], or there are no buckets.
    """
    _check_share("mask_ratio", mask_ratio, buckets)
    places = ((mask_ratio.double() - _EDGE) * buckets).ceil().long() - 1
    return places.clamp(0, buckets - 1)


def segment_of(time: Tensor, segments: int) -> Tensor:
    """Returns the segment of every time, int64 of the same shape; for states that are drawn at a time t.

    Args:
        time: Float, any shape, t in [0, 1]: the share that is masked in the mean.
        segments: Q, at least 1.

    Raises:
        ValueError: A time lies outside [0, 1], or there are no segments.
    """
    _check_share("time", time, segments)
    return ((1 - time.double() + _EDGE) * segments).floor().long().clamp(0, segments - 1)


def tabulate(segment: Tensor, bucket: Tensor, *, segments: int, buckets: int, amounts: Tensor | None = None) -> Table:
    """Adds up `amounts` (int64 [n]; None counts 1 each) by cell; `segment` and `bucket` are int64 [n]."""
    amounts = torch.ones_like(segment) if amounts is None else amounts
    table = torch.zeros(segments, buckets, dtype=torch.int64).index_put((segment, bucket), amounts, accumulate=True)
    return tuple(tuple(row) for row in table.tolist())


def measure_coverage(
    mask: Tensor,
    attention_mask: Tensor,
    mask_ratio: Tensor,
    segment: Tensor,
    *,
    segments: int,
    buckets: int,
    recorded: Table | None = None,
) -> Coverage:
    """Counts states and tokens by trajectory segment and mask ratio.

    Args:
        mask: bool [n, length], True where a state holds the mask token.
        attention_mask: bool [n, length], False on padding.
        mask_ratio: Float [n] in [0, 1], the masked share of what can be masked.
        segment: int64 [n], the segment of each state, from 0.
        segments: Number of segments.
        buckets: Number of mask-ratio buckets.
        recorded: The states that could be selected, if these were selected.

    Raises:
        ValueError: Shapes do not fit, a segment or a ratio is out of range, or `recorded` holds less than the states.
    """
    if mask.ndim != 2 or attention_mask.shape != mask.shape or not mask_ratio.shape == segment.shape == mask.shape[:1]:
        shapes = ", ".join(str(tuple(value.shape)) for value in (mask, attention_mask, mask_ratio, segment))
        raise ValueError(f"mask, attention_mask, mask_ratio, segment: shapes {shapes}; valid: [n, L] twice, [n] twice")
    if segment.numel() and not 0 <= int(segment.min()) <= int(segment.max()) < segments:
        raise ValueError(f"segment: {segment.tolist()}; valid: 0 to {segments - 1}")
    bucket = bucket_of(mask_ratio, buckets)
    masked = (mask & attention_mask).sum(1)
    return Coverage(
        states=tabulate(segment, bucket, segments=segments, buckets=buckets),
        masked_tokens=tabulate(segment, bucket, segments=segments, buckets=buckets, amounts=masked),
        unmasked_tokens=tabulate(
            segment, bucket, segments=segments, buckets=buckets, amounts=attention_mask.sum(1) - masked
        ),
        recorded=recorded,
    )


def _check_share(name: str, share: Tensor, parts: int) -> None:
    if parts < 1:
        raise ValueError(f"{name}: {parts} parts; valid: at least 1")
    if not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError(f"{name}: valid values lie in [0, 1]")


def _shape(name: str, table: Table) -> tuple[int, int]:
    widths = {len(row) for row in table}
    if len(widths) != 1 or 0 in widths:
        raise ValueError(f"{name}: {table}; valid: a table [segments][buckets]")
    if min(min(row) for row in table) < 0:
        raise ValueError(f"{name}: {table}; valid: counts of at least 0")
    return len(table), widths.pop()


def _table(name: str, rows: Any) -> Table:
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and all(type(count) is int for count in row) for row in rows
    ):
        raise ValueError(f"{name}: {rows!r}; valid: lists of integers, [segments][buckets]")
    return tuple(tuple(row) for row in rows)


def _note(sentence: str, cells: Sequence[str]) -> tuple[str, ...]:
    return (sentence + ", ".join(cells),) if cells else ()


def _total(table: Table) -> int:
    return sum(map(sum, table))
