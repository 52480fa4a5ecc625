"""Bit packing: the drawn layout bit by bit, a slow reference, and round trips of every width and shape."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllmquant.nn.packing import mixed_width, pack, pack_mixed, packed_width, unpack, unpack_mixed


def random_codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def reference(codes: list[int], bits: int) -> list[int]:
    """A row as one big integer, code i shifted by i·bits, cut into little-endian bytes."""
    number = sum(code << (index * bits) for index, code in enumerate(codes))
    return list(number.to_bytes(math.ceil(len(codes) * bits / 8), "little"))


def test_three_bits_as_drawn() -> None:
    """Codes a = 1, b = 2, ..., g = 7, h = 0, i = 5, written from the high bit of each byte down.

    byte 0: c c b b b a a a = 11 010 001     byte 1: f e e e d d d c = 0 101 100 0
    byte 2: h h h g g g f f = 000 111 11     byte 3: . . . . . i i i = 00000 101
    """
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 5]], dtype=torch.uint8)
    expected = [0b11010001, 0b01011000, 0b00011111, 0b00000101]
    assert pack(codes, 3).tolist() == [expected]
    assert unpack(torch.tensor([expected], dtype=torch.uint8), 3, 9).tolist() == codes.tolist()


def test_four_bits_by_hand() -> None:
    """Two codes per byte, the first in the low nibble."""
    assert pack(torch.tensor([[0x1, 0xF, 0xA]], dtype=torch.uint8), 4).tolist() == [[0xF1, 0x0A]]


@settings(max_examples=100, deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(0, 4),
    columns=st.integers(0, 37),
    seed=st.integers(0, 10_000),
    transposed=st.booleans(),
)
def test_round_trip_and_reference(bits: int, rows: int, columns: int, seed: int, transposed: bool) -> None:
    codes = random_codes(rows, columns, bits, seed)
    if transposed:  # not contiguous
        codes = codes.T.contiguous().T
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(columns, bits)) == (rows, math.ceil(columns * bits / 8))
    assert packed.tolist() == [reference(row, bits) for row in codes.tolist()]
    restored = unpack(packed, bits, columns)
    assert restored.dtype == torch.uint8
    assert restored.shape == codes.shape
    assert torch.equal(restored, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_extreme_codes(bits: int) -> None:
    for value in (0, 2**bits - 1):
        codes = torch.full((2, 13), value, dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, bits), bits, 13), codes)


def test_rows_are_packed_apart() -> None:
    """Rows start at whole bytes, so a row can be packed alone."""
    codes = random_codes(5, 7, 3, 0)
    for row in range(5):
        assert torch.equal(pack(codes, 3)[row : row + 1], pack(codes[row : row + 1], 3))


def mixed_codes(rows: int, size: int, bits: list[int], seed: int) -> Tensor:
    groups = [random_codes(rows, size, width, seed + g) << int(width == 1) for g, width in enumerate(bits)]
    return torch.cat(groups, dim=1)


def mixed_reference(codes: list[int], bits: list[int]) -> list[int]:
    """For each width that occurs, narrowest first, the stream of its groups' codes."""
    size = len(codes) // len(bits)
    row = []
    for width in range(1, 9):
        own = [code for index, code in enumerate(codes) if bits[index // size] == width]
        row += reference([code // 2 for code in own] if width == 1 else own, width)
    return row


def test_mixed_widths_as_drawn() -> None:
    """Groups aA bB cC dD of the widths 3 1 3 1: a = 1, A = 2, b = 0, B = 2, c = 5, C = 6, d = 2, D = 0.

    byte 0: . . . . D d B b = 0000 0 1 1 0     byte 1: c c A A A a a a = 01 010 001     byte 2: C C C c = 0000 110 1
    """
    codes = torch.tensor([[1, 2, 0, 2, 5, 6, 2, 0]], dtype=torch.uint8)
    expected = [0b00000110, 0b01010001, 0b00001101]
    assert pack_mixed(codes, (3, 1, 3, 1)).tolist() == [expected]
    assert torch.equal(unpack_mixed(torch.tensor([expected], dtype=torch.uint8), (3, 1, 3, 1), 8), codes)


@settings(max_examples=150, deadline=None)
@given(
    bits=st.lists(st.integers(1, 8), min_size=1, max_size=9),
    rows=st.integers(0, 4),
    size=st.integers(1, 13),
    seed=st.integers(0, 10_000),
)
def test_mixed_round_trip_and_reference(bits: list[int], rows: int, size: int, seed: int) -> None:
    codes = mixed_codes(rows, size, bits, seed)
    packed = pack_mixed(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, mixed_width(size * len(bits), bits))
    assert packed.tolist() == [mixed_reference(row, bits) for row in codes.tolist()]
    restored = unpack_mixed(packed, bits, size * len(bits))
    assert (restored.dtype, restored.shape) == (torch.uint8, codes.shape)
    assert torch.equal(restored, codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_one_width_for_all_is_the_plain_layout(bits: int) -> None:
    codes = random_codes(3, 35, bits, 1)
    for groups in (1, 5, 35):
        assert torch.equal(pack_mixed(codes, [bits] * groups), pack(codes, bits))
        assert torch.equal(unpack_mixed(pack(codes, bits), [bits] * groups, 35), codes)


def test_mixed_errors() -> None:
    codes = mixed_codes(2, 4, [1, 3], 0)
    for widths in ([], [2] * 3):
        with pytest.raises(ValueError, match=f"bits: {len(widths)} widths; valid: a number that divides the 8 columns"):
            pack_mixed(codes, widths)
        with pytest.raises(ValueError, match=f"bits: {len(widths)} widths; valid: a number that divides the 8 columns"):
            unpack_mixed(codes, widths, 8)
    for width in (0, 9):
        with pytest.raises(ValueError, match=f"bits: {width}; valid: 1 to 8"):
            pack_mixed(codes, [3, width])
    for code in (1, 3):
        broken = codes.clone()
        broken[1, 2] = code
        with pytest.raises(ValueError, match="a group of one bit has a code that is neither 0 nor 2"):
            pack_mixed(broken, [1, 3])
    with pytest.raises(ValueError, match="codes: 7 does not fit in 2 bits"):
        pack_mixed(torch.full((1, 8), 7, dtype=torch.uint8), [3, 2])
    with pytest.raises(ValueError, match=r"expected a uint8 matrix, got torch\.int64"):
        pack_mixed(codes.long(), [1, 3])
    with pytest.raises(ValueError, match="packed: 3 bytes per row, expected 4"):
        unpack_mixed(pack_mixed(codes, [1, 3]), [3, 3, 3, 4], 8)


def test_errors() -> None:
    codes = random_codes(2, 5, 3, 0)
    for bits in (0, 9, -1):
        with pytest.raises(ValueError, match=f"bits: {bits}; valid: 1 to 8"):
            pack(codes, bits)
        with pytest.raises(ValueError, match=f"bits: {bits}; valid: 1 to 8"):
            unpack(codes, bits, 5)
    codes[1, 4] = 8
    with pytest.raises(ValueError, match="codes: 8 does not fit in 3 bits"):
        pack(codes, 3)
    with pytest.raises(ValueError, match=r"expected a uint8 matrix, got torch\.int64"):
        pack(codes.long(), 4)
    with pytest.raises(ValueError, match=r"expected a uint8 matrix, got torch.uint8 of shape \(5,\)"):
        pack(codes[0], 4)
    packed = pack(codes, 4)
    for columns in (4, 7):
        with pytest.raises(ValueError, match="packed: 3 bytes per row, expected"):
            unpack(packed, 4, columns)
    with pytest.raises(ValueError, match="expected a uint8 matrix"):
        unpack(packed.int(), 4, 5)
