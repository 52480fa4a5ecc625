"""The blocks of Qwen2, Qwen3 and Qwen3-MoE under their module names, attending to whatever a mask allows.

Deviation from the published code of the families built of them, in float16 and bfloat16: queries and keys are rotated,
and experts' outputs weighted and summed, in float32, where that code rounds the rotary tables, the weights and every
partial sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllmquant.models.block_causal import BlockCausalLM
from dllmquant.models.experts import RoutedExperts
from dllmquant.models.key_values import ShownColumns, rotary_tables
from dllmquant.models.layers import GatedMLP, RMSNorm, apply_rotary, repeat_heads, split_heads


class QwenAttention(nn.Module):
    """Attention with grouped key/value heads, and without a bias at the output."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, *, qkv_bias: bool, norm_eps: float | None = None
    ) -> None:
        """Makes the layer.

        Args:
            width: Of the residual stream.
            heads: Query heads.
            kv_heads: Key/value heads; a divisor of `heads`.
            head_dim: Width of a head.
            qkv_bias: Whether queries, keys and values have a bias (Qwen2).
            norm_eps: If given, queries and keys are normed per head, with this epsilon (Qwen3).
        """
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.q_proj = nn.Linear(width, heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.q_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps)
        self.k_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None, shown: ShownColumns | None = None
    ) -> Tensor:
        """Maps normed tokens [batch, length, width] to what is added to the residual stream.

        Args:
            x: Normed tokens.
            cos: RoPE cosines, float32 [length, head_dim] or [batch, 1, length, head_dim].
            sin: RoPE sines of the same shape.
            attention_mask: None, or bool broadcastable to [batch, heads, length, keys], True where attended.
            shown: Which columns the tokens are, where keys and values are kept; None where they are all.
        """
        q, k, v = (split_heads(project(x), self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if shown is not None:
            k, v = shown.exchange(self, k, v)
        attended = F.scaled_dot_product_attention(
            q, repeat_heads(k, self.heads), repeat_heads(v, self.heads), attn_mask=attention_mask
        )
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(-2))
        return out


class QwenMixture(nn.Module):
    """Experts of which every token reads the likeliest ones, each weighted by its probability."""

    def __init__(self, width: int, hidden: int, experts: int, chosen: int, *, normed: bool) -> None:
        """Makes the layer.

        Args:
            width: Of the residual stream.
            hidden: Width of an expert.
            experts: Number of experts.
            chosen: How many of them read a token.
            normed: Whether the probabilities of those that read a token are divided by their sum.
        """
        super().__init__()
        self.chosen, self.normed = chosen, normed
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = RoutedExperts(GatedMLP(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        """Maps normed tokens [batch, length, width] to what is added to the residual stream."""
        tokens = x.flatten(0, 1)
        logits = self.gate(tokens)
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = probabilities.topk(self.chosen, dim=-1)
        if self.normed:
            weights = weights / weights.sum(-1, keepdim=True)
        out: Tensor = self.experts(tokens, chosen, weights).unflatten(0, x.shape[:2])
        return out


class QwenBlock(nn.Module):
    """One pre-norm block: attention, then the feed-forward layer, whatever it is made of."""

    def __init__(self, config: Any, mlp: nn.Module, *, qkv_bias: bool, qk_norm: bool) -> None:
        """Makes the block.

        Args:
            config: Has `hidden_size`, `num_attention_heads`, `num_key_value_heads`, `head_dim` and `rms_norm_eps`.
            mlp: The feed-forward layer.
            qkv_bias: Whether queries, keys and values have a bias.
            qk_norm: Whether queries and keys are normed per head.
        """
        super().__init__()
        self.self_attn = QwenAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            qkv_bias=qkv_bias,
            norm_eps=config.rms_norm_eps if qk_norm else None,
        )
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention_mask: Tensor | None = None,
        shown: ShownColumns | None = None,
    ) -> Tensor:
        """Maps the residual stream [batch, length, hidden_size] to the next one; arguments as in `QwenAttention`."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention_mask, shown)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class QwenBody(nn.Module):
    """Embedding, blocks and final norm, under the published module names."""

    def __init__(self, config: Any, blocks: Sequence[QwenBlock]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, attention_mask: Tensor | None, shown: ShownColumns | None = None) -> Tensor:
        """Returns the last hidden state, normed, for embeddings `x` [batch, length, hidden_size]."""
        cos, sin = rotary_tables(x, shown, self.config.head_dim, self.config.rope_theta)
        kept = {} if shown is None else {"shown": shown}
        for block in self.layers:
            x = block(x, cos, sin, attention_mask=attention_mask, **kept)
        out: Tensor = self.norm(x)
        return out


class BlockCausalQwen(BlockCausalLM):
    """Qwen's blocks, attending to their own block of tokens and earlier ones. Abstract: families derive from it."""

    _no_split_modules = ["QwenBlock"]  # noqa: RUF012 - declared so by the base class

    def __init__(self, config: Any, blocks: Sequence[QwenBlock]) -> None:
        super().__init__(config)
        self.model = QwenBody(config, blocks)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]
