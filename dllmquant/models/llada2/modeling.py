"""The LLaDA2 architecture for transformers 5: mixture blocks that attend to their own block of tokens and earlier ones.

Module names are those of the published checkpoints (`model.layers.N.attention.query_key_value`, ...), so their state
dicts load unchanged and without remote code. Positions are relative (RoPE), and blocks of tokens are counted from the
first real one, so left and right padding are equivalent.

Deviations from the published code:
    1. Its caller gives the block-causal mask; here the model makes it from a padding mask or from none. A boolean
       four-dimensional mask is used as given.
    2. In float16 and bfloat16, queries and keys are rotated in float32, where that code rounds the rotary tables, and
       the routers' `expert_bias` keeps the float32 in which it may be stored, where that code rounds it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllmquant.models.block_causal import BlockCausalLM
from dllmquant.models.experts import RoutedExperts
from dllmquant.models.key_values import ShownColumns, rotary_tables
from dllmquant.models.layers import GatedMLP, RMSNorm, apply_rotary, repeat_heads, split_heads
from dllmquant.models.llada2.configuration import LLaDA2MoeConfig


class LLaDA2Attention(nn.Module):
    """Attention with fused projections; queries and keys are normed per head, then rotated in part."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=False)
        self.dense = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None, shown: ShownColumns | None = None
    ) -> Tensor:
        """Maps normed tokens [batch, length, hidden_size] to what is added to the residual stream."""
        heads = split_heads(self.query_key_value(x), self.head_dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q = rotate_first(self.query_layernorm(q), cos, sin)
        k = rotate_first(self.key_layernorm(k), cos, sin)
        if shown is not None:
            k, v = shown.exchange(self, k, v)
        k, v = repeat_heads(k, self.heads), repeat_heads(v, self.heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        out: Tensor = self.dense(attended.transpose(1, 2).flatten(-2))
        return out


class LLaDA2Gate(nn.Linear):
    """A router: scores every expert for every token, in float32 or wider."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scores between 0 and 1, [tokens, experts], of tokens [tokens, hidden_size]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide)).sigmoid()


class LLaDA2Mixture(nn.Module):
    """Experts of which every token reads a few, and shared experts that read every token.

    Which experts a token reads is decided by their scores plus a bias that balances their load; how much they count,
    by the scores alone.
    """

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.moe_intermediate_size
        self.groups, self.kept_groups = config.n_group, config.topk_group
        self.chosen, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.gate = LLaDA2Gate(config)
        self.experts = RoutedExperts(GatedMLP(width, hidden) for _ in range(config.num_experts))
        self.shared_experts = GatedMLP(width, hidden * config.num_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Maps normed tokens [batch, length, hidden_size] to what is added to the residual stream."""
        tokens = x.flatten(0, 1)
        scores = self.gate(tokens)
        chosen = choose_in_groups(scores + self.gate.expert_bias, self.groups, self.kept_groups, self.chosen)
        weights = scores.gather(-1, chosen)
        if self.chosen > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        routed = self.experts(tokens, chosen, weights * self.scaling).unflatten(0, x.shape[:2])
        out: Tensor = routed + self.shared_experts(x)
        return out


class LLaDA2Block(nn.Module):
    """One pre-norm block: attention, then the feed-forward layer, which is dense or a mixture."""

    def __init__(self, config: LLaDA2MoeConfig, *, dense: bool) -> None:
        super().__init__()
        self.attention = LLaDA2Attention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size) if dense else LLaDA2Mixture(config)
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
        """Maps the residual stream [batch, length, hidden_size] to the next one.

        Args:
            x: Residual stream.
            cos: RoPE cosines, float32 [length, rotated width] or [batch, 1, length, rotated width].
            sin: RoPE sines of the same shape.
            attention_mask: None, or bool broadcastable to [batch, heads, length, keys], True where attended.
            shown: Which columns the tokens are, where keys and values are kept; None where they are all.
        """
        x = x + self.attention(self.input_layernorm(x), cos, sin, attention_mask, shown)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class LLaDA2Body(nn.Module):
    """Embedding, blocks and final norm, under the published module names."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LLaDA2Block(config, dense=index < config.first_k_dense_replace) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, attention_mask: Tensor | None, shown: ShownColumns | None = None) -> Tensor:
        """Returns the last hidden state, normed, for embeddings `x` [batch, length, hidden_size]."""
        cos, sin = rotary_tables(x, shown, self.config.rotated_width, self.config.rope_theta)
        kept = {} if shown is None else {"shown": shown}
        for block in self.layers:
            x = block(x, cos, sin, attention_mask=attention_mask, **kept)
        out: Tensor = self.norm(x)
        return out


class LLaDA2MoeModelLM(BlockCausalLM):
    """LLaDA2 with its output head: predicts the token under every mask of a block from it and the blocks before."""

    config: LLaDA2MoeConfig
    config_class = LLaDA2MoeConfig
    _no_split_modules = ["LLaDA2Block"]  # noqa: RUF012 - declared so by the base class
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012 - so too
    embedding = "word_embeddings"

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.model = LLaDA2Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


def rotate_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first components of `x` [batch, heads, length, head_dim], as many as the tables have, by position."""
    width = cos.shape[-1]
    return torch.cat((apply_rotary(x[..., :width], cos, sin), x[..., width:]), dim=-1)


def choose_in_groups(scores: Tensor, groups: int, kept: int, count: int) -> Tensor:
    """Returns each token's `count` best experts, int64 [tokens, count], among those of its best groups.

    Args:
        scores: [tokens, experts], the experts of a group side by side.
        groups: Number of groups of equal size.
        kept: Number of groups to choose from: those whose two best experts have the largest sum.
        count: Number of experts to choose.
    """
    grouped = scores.unflatten(-1, (groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
    closed = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores.device).scatter_(-1, best, False)
    chosen: Tensor = grouped.masked_fill(closed[..., None], -torch.inf).flatten(-2).topk(count, dim=-1).indices
    return chosen
