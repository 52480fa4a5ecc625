"""The experts of a mixture layer, and which tokens each of them reads."""

import torch
from torch import Tensor, nn


class RoutedExperts(nn.ModuleList):
    """Experts, each a module that maps tokens [n, width] to tokens [n, width].

    The quantizer knows mixture layers by this class: statistics and token weights follow the tokens that `routed_to`
    says an expert reads. Routers are separate modules.
    """

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sums, for every token, the outputs of the experts it chose.

        An expert reads all its tokens in one call, in ascending order; one that no token chose is not called. Arguments
        are given by position: the quantizer reads them there.

        Args:
            x: Tokens [T, width]: those of all sequences, [batch, length, width] flattened row by row.
            chosen: int64 [T, k], the experts each token chose, all different.
            weights: [T, k], how much each counts.

        Returns:
            [T, width] in `x`'s dtype; sums are taken in the wider of the dtypes of `x` and `weights`.
        """
        wide = torch.promote_types(x.dtype, weights.dtype)
        total = torch.zeros(x.shape, dtype=wide, device=x.device)
        for index, expert in enumerate(self):
            tokens, slots = (chosen == index).nonzero(as_tuple=True)
            if len(tokens):
                total.index_add_(0, tokens, expert(x[tokens]).to(wide) * weights[tokens, slots, None].to(wide))
        return total.to(x.dtype)


def routed_to(chosen: Tensor, expert: int) -> Tensor:
    """Returns which tokens an expert reads, int64 [n] ascending, of the choices [T, k] given to `RoutedExperts`."""
    return (chosen == expert).any(-1).nonzero().squeeze(1)


def mixtures(module: nn.Module) -> dict[str, RoutedExperts]:
    """Returns the mixture layers inside a module, by path."""
    return {name: found for name, found in module.named_modules() if isinstance(found, RoutedExperts)}


def is_expert(block: nn.Module, module: nn.Module) -> bool:
    """Whether a module of a block is part of an expert, so that it reads only the tokens routed there."""
    return any(
        module is inner for mixture in mixtures(block).values() for expert in mixture for inner in expert.modules()
    )
