"""What the blocks of several families are made of: norms, feed-forward layers, rotary positions, attention masks.

Rotary tables are computed while the model runs. They are no buffers: buffers that a checkpoint does not store hold
whatever memory held before after a model was built on the meta device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` [..., size]; the result has `x`'s dtype."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class GatedMLP(nn.Module):
    """A SiLU-gated feed-forward layer without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps normed tokens [..., width] to what is added to the residual stream."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def rotary_cos_sin(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the cosine and sine tables of RoPE, float32 [length, head_dim], each half repeated."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), 1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `x` [batch, heads, length, head_dim] in float32 or wider and returns it in its own dtype."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Turns [batch, length, heads * head_dim] into [batch, heads, length, head_dim]."""
    split: Tensor = x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return split


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeats each of the heads of `x` [batch, fewer, length, head_dim] in a row until there are `heads`."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def expand_attention_mask(attention_mask: Tensor | None, ids_shape: torch.Size, n_heads: int) -> Tensor | None:
    """Turns a user's attention mask into what the attention needs.

    Args:
        attention_mask: None; a padding mask [batch, length] (nonzero = real token); or a bool mask [1 or batch, 1 or
            heads, length, length], True where attended (block-causal decoding).
        ids_shape: Shape [batch, length] of the inputs.
        n_heads: Number of query heads.

    Returns:
        None when no mask was given, else a bool mask broadcastable to [batch, heads, length, length].

    Raises:
        ValueError: The mask has another shape, or a four-dimensional mask is not boolean.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape == ids_shape:
        return attention_mask.bool()[:, None, None, :]
    batch, length = ids_shape
    valid = {(b, h, length, length) for b in (1, batch) for h in (1, n_heads)}
    if tuple(attention_mask.shape) in valid:
        if attention_mask.dtype != torch.bool:
            raise ValueError(f"attention_mask: 4-D masks must be bool (True = attended), got {attention_mask.dtype}")
        return attention_mask
    raise ValueError(
        f"attention_mask: shape {tuple(attention_mask.shape)} does not fit inputs {tuple(ids_shape)}; "
        f"valid: [batch, length] or bool [1 or batch, 1 or {n_heads} heads, length, length]"
    )


def block_causal_mask(
    attention_mask: Tensor | None, shape: torch.Size, block_length: int, device: torch.device
) -> Tensor:
    """Returns which tokens a token attends to when blocks follow one another: those of its own block and earlier ones.

    Args:
        attention_mask: Padding mask [batch, length], nonzero on real tokens; None if all are.
        shape: (batch, length) of the inputs.
        block_length: Tokens per block, counted from each row's first real token.
        device: Where the mask is needed.

    Returns:
        bool [batch, 1, length, length], with batch 1 if there is no padding mask; False for keys that are padding.

    Raises:
        ValueError: The padding mask has another shape.
    """
    if attention_mask is None:
        real = torch.ones(1, shape[1], dtype=torch.bool, device=device)
    elif attention_mask.shape == shape:
        real = attention_mask.to(device).bool()
    else:
        raise ValueError(f"attention_mask: shape {tuple(attention_mask.shape)}; valid: {tuple(shape)}")
    block = (real.cumsum(1) - 1).clamp(min=0) // block_length
    allowed: Tensor = (block[:, :, None] >= block[:, None, :]) & real[:, None, :]
    return allowed[:, None]
