"""Bit packing: codes of any width as a little-endian bit stream per row. Layout version 1.

Code i of a row occupies bits i·b ... i·b + b − 1 of the row's stream, least significant bit first; bit k of the stream
is bit k mod 8 of byte k div 8. Rows are padded with zero bits to whole bytes. For b = 3:

    byte          0                1                2
    bit    7 6 5 4 3 2 1 0  7 6 5 4 3 2 1 0  7 6 5 4 3 2 1 0
    code   c c b b b a a a  f e e e d d d c  h h h g g g f f
"""

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
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed[..., None] >> places) & 1).flatten(1)[:, : columns * bits]
    shifts = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (stream.view(len(packed), columns, bits) << shifts).sum(-1, dtype=torch.int32).to(torch.uint8)


def _check(tensor: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: {bits}; valid: 1 to 8")
    if tensor.dtype != torch.uint8 or tensor.ndim != 2:
        raise ValueError(f"expected a uint8 matrix, got {tensor.dtype} of shape {tuple(tensor.shape)}")
