"""Keys and values that attention keeps between the denoising steps of block-causal models.

Rows of a batch are decoded at different blocks, which begin at different columns, so what is kept is found by row and
column: one buffer [batch, columns, heads, head_dim] per attention layer, of which a step overwrites the columns it was
given and reads those that its tokens attend to.
"""

from torch import Tensor, nn

from dllmquant.models.layers import rotary_cos_sin


class KeyValues:
    """What the attention layers of a model made of a batch so far; a layer's buffers are made when it is first used.

    Attributes:
        block: int64 [batch, columns], the block of every column, counted from each row's first real token.
        real: bool [batch, columns], False at left padding.
    """

    def __init__(self, attention_mask: Tensor, block_length: int) -> None:
        """Begins a batch.

        Args:
            attention_mask: Padding mask [batch, columns], nonzero on real tokens.
            block_length: Tokens per block.
        """
        self.real = attention_mask.bool()
        self.block = (self.real.cumsum(1) - 1).clamp(min=0) // block_length
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def at(self, rows: Tensor, columns: Tensor) -> "ShownColumns":
        """Returns what a forward pass over some columns [n, shown] of some rows [n] needs."""
        return ShownColumns(self, rows, columns)

    def buffers(self, layer: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a layer's buffers, made like its first keys and values [n, heads, shown, head_dim]."""
        if layer not in self._kept:
            # Zeros: columns that were never shown are hidden by the mask, but 0 · NaN would still be NaN.
            self._kept[layer] = (
                keys.new_zeros(*self.block.shape, keys.shape[1], keys.shape[3]),
                values.new_zeros(*self.block.shape, values.shape[1], values.shape[3]),
            )
        return self._kept[layer]


class ShownColumns:
    """The tokens of one forward pass, among all columns of their rows.

    Attributes:
        columns: int64 [n, shown].
        mask: bool [n, 1, shown, end], which columns the shown tokens attend to: real ones of their own and earlier
            blocks. The last column that is shown is `end` - 1.
    """

    def __init__(self, kept: KeyValues, rows: Tensor, columns: Tensor) -> None:
        self.columns = columns
        self._kept, self._places = kept, (rows[:, None], columns)
        self._rows = slice(None) if len(rows) == len(kept.block) else rows  # all rows are read without a copy
        self._end = int(columns.max()) + 1
        block = kept.block[rows]
        own = block.gather(1, columns)
        self.mask = (block[:, None, : self._end] <= own[:, :, None]) & kept.real[rows][:, None, : self._end]
        self.mask = self.mask[:, None]

    def exchange(self, layer: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the keys and values of the shown tokens and returns those of all columns the mask knows.

        Args:
            layer: The attention layer they belong to.
            keys: [n, heads, shown, head_dim], positions applied.
            values: [n, heads, shown, head_dim].

        Returns:
            Keys and values [n, heads, end, head_dim].
        """
        everything = []
        for buffer, new in zip(self._kept.buffers(layer, keys, values), (keys, values), strict=True):
            buffer[self._places] = new.transpose(1, 2)
            everything.append(buffer[self._rows, : self._end].transpose(1, 2))
        return everything[0], everything[1]


def rotary_tables(x: Tensor, shown: ShownColumns | None, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of the tokens that a model runs.

    Args:
        x: The tokens [batch, length, hidden_size].
        shown: Which columns they are; None if they are all columns.
        width: Of what is rotated.
        theta: Base of the rotary positions.

    Returns:
        float32 [length, width], or [batch, 1, length, width] of the columns that are shown.
    """
    if shown is None:
        return rotary_cos_sin(x.shape[1], width, theta, x.device)
    cos, sin = rotary_cos_sin(shown.mask.shape[-1], width, theta, x.device)
    return cos[shown.columns][:, None], sin[shown.columns][:, None]
