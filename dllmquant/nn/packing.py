"""Bit packing: codes of one or several widths as little-endian bit streams per row. Layout version 1.

Code i of a row occupies bits i·b ... i·b + b − 1 of the row's stream, least significant bit first; bit k of the stream
is bit k mod 8 of byte k div 8. Rows are padded with zero bits to whole bytes. For b = 3:

    byte          0                1                2
    bit    7 6 5 4 3 2 1 0  7 6 5 4 3 2 1 0  7 6 5 4 3 2 1 0
    code   c c b b b a a a  f e e e d d d c  h h h g g g f f

Where column groups differ in width, a row is one such stream per width that occurs, narrowest first. A stream holds the
codes of all groups of its width, from left to right, and is padded with zero bits to whole bytes, so a row is unpacked
with one pass per width and one gather of groups. Groups of one bit have the codes 0 and 2 (see `dllmquant.core.grid`),
stored as 0 and 1. For the groups aA bB cC dD of two columns each and the widths 3 1 3 1:

    byte          0                1                2
    bit    7 6 5 4 3 2 1 0  7 6 5 4 3 2 1 0  7 6 5 4 3 2 1 0
    code   . . . . D d B b  c c A A A a a a  . . . . C C C c
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def packed_width(columns: int, bits: int) -> int:
    """Returns the bytes of a row of `columns` codes."""
    return (columns * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes.

    Args:
        codes: uint8 [rows, columns], each below 2**bits.
        bits: 1 to 8.

    Returns:
        uint8 [rows, ceil(columns·bits / 8)].

    Raises:
        ValueError: The dtype, the shape or the width is wrong, or a code does not fit.
    """
    _check(codes, bits)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes: {int(codes.max())} does not fit in {bits} bits")
    rows, columns = codes.shape
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes[..., None] >> shifts) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, packed_width(columns, bits) * 8 - columns * bits))
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (stream.view(rows, stream.shape[1] // 8, 8) << places).sum(-1, dtype=torch.int32).to(torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Restores the codes, uint8 [rows, columns]; the inverse of `pack`.

    Raises:
        ValueError: The dtype, the shape or the width is wrong.
    """
    _check(packed, bits)
    if packed.shape[1] != packed_width(columns, bits):
        raise ValueError(f"packed: {packed.shape[1]} bytes per row, expected {packed_width(columns, bits)}")
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :columns]
    # eight codes fill `bits` whole bytes, and each lies in one of them or in two neighbours
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits))
    cells = padded.view(len(packed), padded.shape[1] // bits, bits)
    codes = cells.new_empty(*cells.shape[:2], 8)
    for code in range(8):
        byte, offset = divmod(code * bits, 8)
        codes[..., code] = cells[..., byte] >> offset
        if offset + bits > 8:
            codes[..., code] |= cells[..., byte + 1] << (8 - offset)
    return codes.bitwise_and_((1 << bits) - 1).flatten(1)[:, :columns]


def mixed_width(columns: int, bits: Sequence[int]) -> int:
    """Returns the bytes of a row of `columns` codes, in groups of the widths `bits`."""
    return sum(packed_width(columns // len(bits) * len(groups), width) for width, groups in _streams(bits))


def pack_mixed(codes: Tensor, bits: Sequence[int]) -> Tensor:
    """Packs codes whose column groups differ in width.

    Args:
        codes: uint8 [rows, columns], each below 2**bits of its group; in groups of one bit 0 or 2.
        bits: 1 to 8 for each of the equally many columns' groups. If all are the same, 2 to 8, the bytes are `pack`'s.

    Returns:
        uint8 [rows, `mixed_width`].

    Raises:
        ValueError: As `pack`, or the widths do not divide the columns.
    """
    _check_groups(codes, bits, codes.shape[-1])
    groups = codes.unflatten(1, (len(bits), -1))
    streams = []
    for width, members in _streams(bits):
        own = groups[:, members].flatten(1)
        if width == 1:
            if bool((own & ~2).any()):
                raise ValueError("codes: a group of one bit has a code that is neither 0 nor 2")
            own = own >> 1
        streams.append(pack(own, width))
    return torch.cat(streams, dim=1)


def unpack_mixed(packed: Tensor, bits: Sequence[int], columns: int) -> Tensor:
    """Restores the codes, uint8 [rows, columns]; the inverse of `pack_mixed`.

    Raises:
        ValueError: The dtype, the shape or a width is wrong.
    """
    _check_groups(packed, bits, columns)
    if packed.shape[1] != mixed_width(columns, bits):
        raise ValueError(f"packed: {packed.shape[1]} bytes per row, expected {mixed_width(columns, bits)}")
    streams, size = _streams(bits), columns // len(bits)
    parts = packed.split([packed_width(size * len(members), width) for width, members in streams], dim=1)
    codes = [
        unpack(part, width, size * len(members)) << int(width == 1)
        for part, (width, members) in zip(parts, streams, strict=True)
    ]
    if len(codes) == 1:
        return codes[0]
    stored = [group for _, members in streams for group in members]
    place = torch.tensor(stored, device=packed.device).argsort()
    groups: Tensor = torch.cat(codes, dim=1).unflatten(1, (len(bits), size))
    return groups[:, place].flatten(1)


def _streams(bits: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Returns the widths that occur, narrowest first, and the groups of each."""
    return [(width, [group for group, own in enumerate(bits) if own == width]) for width in sorted(set(bits))]


def _check_groups(tensor: Tensor, bits: Sequence[int], columns: int) -> None:
    if not bits or columns % len(bits):
        raise ValueError(f"bits: {len(bits)} widths; valid: a number that divides the {columns} columns")
    _check(tensor, bits[0])


def _check(tensor: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: {bits}; valid: 1 to 8")
    if tensor.dtype != torch.uint8 or tensor.ndim != 2:
        raise ValueError(f"expected a uint8 matrix, got {tensor.dtype} of shape {tuple(tensor.shape)}")
