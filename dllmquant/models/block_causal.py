"""What block-causal families have in common: their mask, and the cache that it makes possible.

A token attends to its own block, in both directions, and to all blocks before it. Blocks are counted from a row's first
real token, so left padding changes nothing. What follows a finished block does not change its keys and values.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dllmquant.models.key_values import KeyValues
from dllmquant.models.layers import block_causal_mask
from dllmquant.models.masked_lm import NativeMaskedLM


class BlockCausalLM(NativeMaskedLM):
    """A model whose tokens attend to their own block and to earlier ones. Abstract: families derive from it.

    Its configuration has a `block_length`, and its body takes a third argument: which columns its tokens are
    (`ShownColumns`), where keys and values are kept; the mask is theirs then.
    """

    def visible(self, attention_mask: Tensor | None, embeds: Tensor) -> Tensor | None:
        """Turns a padding mask, or none, into the block-causal mask; a four-dimensional one is taken as given."""
        if attention_mask is None or attention_mask.ndim == 2:
            return block_causal_mask(attention_mask, embeds.shape[:2], self.config.block_length, embeds.device)
        return super().visible(attention_mask, embeds)

    def open_cache(self, attention_mask: Tensor) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
        """Begins a batch whose finished blocks are computed once; see `dllmquant.decoding.CachedDenoiser`.

        Args:
            attention_mask: Padding mask [batch, columns] of the whole canvas.

        Returns:
            A function (rows [n], columns [n, shown], ids [n, shown], wanted) -> logits [n, wanted, vocab_size] of the
            last columns, as the model computes them from all. It keeps a key and a value per key/value head, block and
            column.
        """
        kept = KeyValues(attention_mask, self.config.block_length)

        def step(rows: Tensor, columns: Tensor, ids: Tensor, wanted: int) -> Tensor:
            shown = kept.at(rows, columns)
            hidden = self.model(self.get_input_embeddings()(ids), shown.mask, shown)
            return self.logits_of(hidden[:, -wanted:])

        return torch.no_grad()(step)
