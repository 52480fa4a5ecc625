"""The online Hadamard rotation of a linear's input (QuaRot, arXiv 2404.00456: R4, before the down projection).

x' = x H with an orthonormal H of entries ±1/√n: an outlier of size a in one channel becomes ±a/√n in n channels. No
data is needed. It can stand before any linear; QuaRot uses it where no rotation can be folded into the weights before.
"""

from dllmquant.core.hadamard import largest_hadamard_block
from dllmquant.nn.transform import InputTransform, TransformStep


def fit_hadamard(in_features: int, *, block_size: int | None = None, seed: int | None = None) -> InputTransform:
    """Makes the transform.

    Args:
        in_features: Width of the input.
        block_size: Order of the matrix, repeated along the diagonal. None takes the largest that can be built and
            divides the width: all of it for 4096 or 12288, 256 for 11008.
        seed: Seed of random signs that flip input channels before the rotation; None, as in QuaRot's R4, for none.

    Raises:
        ValueError: The block size does not divide the width, there is no Hadamard matrix of this order, or the width is
            odd, so that no block would mix anything.
    """
    size = largest_hadamard_block(in_features) if block_size is None else block_size
    if size == 1:
        raise ValueError(f"in_features: {in_features}, block_size: {block_size}; valid: blocks of at least 2 channels")
    return InputTransform(in_features, (TransformStep("hadamard", size, seed),))
