"""Hadamard matrices: ±1 entries, orthogonal rows; divided by √order they are rotations that spread every coordinate.

Orders are f·2**k. The factor 2**k is Sylvester's Kronecker power. The base f, if it is not 1, is a matrix of Paley's,
built from the quadratic residues χ of a prime q, with Q_ij = χ(i − j):

    Paley I,  q ≡ 3 (mod 4), f = q + 1:     H = I + [[0, 1], [−1, Q]]                               12, 20, 108, 140 ...
    Paley II, q ≡ 1 (mod 4), f = 2(q + 1):  H = C ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]]     28, 36, 76, 148 ...
              with C = [[0, 1], [1, Q]]

So 384 = 12·32, 12288 = 12·1024, 14336 = 28·512 and 18944 = 148·128 can be built; 11008 = 172·64 cannot, and is served
by blocks of 256. Bases end at 256, because a base is applied as a dense matrix; powers of primes are left out.
"""

import hashlib
import math
from functools import reduce
from typing import Any

import torch
from scipy.linalg import hadamard
from torch import Tensor

_HOST: Any = {"dtype": torch.float64, "device": "cpu"}  # also where a model is being built on the meta device
_LARGEST_BASE = 256
_LARGEST_POWER = 7  # factors of 2**k are split evenly into matrices of at most 2**7 rows


def hadamard_factors(order: int) -> tuple[Tensor, ...]:
    """Returns matrices of ±1 whose Kronecker product, divided by √order, is `hadamard_matrix(order)`.

    Applying them one after the other costs Σ f instead of Π f operations per element.

    Args:
        order: A positive integer.

    Returns:
        float64 [f, f] each, the Paley base first if there is one; Π f = order.

    Raises:
        ValueError: No matrix of this order can be built; the message names the largest block that can.
    """
    base = _base(order)
    if base is None:
        raise ValueError(
            f"order: no Hadamard matrix of order {order} can be built here; valid: 2**k, or f * 2**k with a Paley base "
            f"f such as 12, 20, 28; use block-diagonal ones of order {largest_hadamard_block(order)}"
        )
    power = (order // base).bit_length() - 1
    parts = math.ceil(power / _LARGEST_POWER)
    factors = [] if base == 1 else [_paley(base)]
    for part in range(parts):
        exponent = power * (part + 1) // parts - power * part // parts
        factors.append(torch.tensor(hadamard(2**exponent), **_HOST))
    return tuple(factors) or (torch.ones(1, 1, **_HOST),)


def hadamard_matrix(order: int) -> Tensor:
    """Returns an orthonormal Hadamard matrix, float64 [order, order] with entries ±1/√order.

    Raises:
        ValueError: See `hadamard_factors`.
    """
    return reduce(torch.kron, hadamard_factors(order)) / math.sqrt(order)


def random_hadamard(order: int, seed: int) -> Tensor:
    """Returns diag(s)·H with random signs s, float64 [order, order]: QuaRot's randomized Hadamard matrix for rows x R.

    The signs stand on the left. There they flip inputs before these are mixed, which gives another rotation for every
    seed; on the right of H they would only flip outputs, which no range and no quantization error depends on.

    Raises:
        ValueError: See `hadamard_factors`.
    """
    return random_signs(order, seed)[:, None] * hadamard_matrix(order)


def random_signs(length: int, seed: int) -> Tensor:
    """Returns signs, float64 [length], each 1 or −1.

    They are the bits of SHAKE-256 of the decimal seed, least significant first, so that a checkpoint may store the seed
    alone: no version of torch or Python changes them.
    """
    stream = hashlib.shake_256(str(seed).encode()).digest((length + 7) // 8)
    bits = [stream[i // 8] >> i % 8 & 1 for i in range(length)]
    return 1 - 2 * torch.tensor(bits, **_HOST)


def largest_hadamard_block(n: int) -> int:
    """Returns the largest order that can be built and divides `n`.

    Raises:
        ValueError: `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"n: {n}; valid: a positive integer")
    return max(divisor for divisor in range(1, n + 1) if n % divisor == 0 and _base(divisor) is not None)


def _base(order: int) -> int | None:
    """Returns the smallest base f with order = f·2**k, None if there is none."""
    if order < 1:
        return None
    odd = order // (order & -order)
    if odd == 1:
        return 1
    candidates = [odd << k for k in range(2, _LARGEST_BASE.bit_length()) if order % (odd << k) == 0]
    return next((f for f in candidates if f <= _LARGEST_BASE and (_paley_one(f) or _paley_two(f))), None)


def _paley_one(base: int) -> bool:
    return (base - 1) % 4 == 3 and _is_prime(base - 1)


def _paley_two(base: int) -> bool:
    return base % 4 == 0 and (base // 2 - 1) % 4 == 1 and _is_prime(base // 2 - 1)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _paley(base: int) -> Tensor:
    """Returns Paley's matrix of ±1, float64 [base, base]."""
    one = _paley_one(base)
    q = base - 1 if one else base // 2 - 1
    residues = {i * i % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in residues else -1 for i in range(1, q)], **_HOST)
    index = torch.arange(q, device="cpu")
    bordered = torch.ones(q + 1, q + 1, **_HOST)
    bordered[0, 0] = 0
    bordered[1:, 1:] = character[(index[:, None] - index) % q]
    identity = torch.eye(q + 1, **_HOST)
    if one:
        bordered[1:, 0] = -1
        return identity + bordered
    plus, minus = torch.tensor([[1, 1], [1, -1]], **_HOST), torch.tensor([[1, -1], [-1, -1]], **_HOST)
    return torch.kron(bordered, plus) + torch.kron(identity, minus)
