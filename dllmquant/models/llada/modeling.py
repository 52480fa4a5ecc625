"""The LLaDA architecture for transformers 5: a bidirectional Llama-style transformer that predicts masked tokens.

Module names are those of the published checkpoints (`model.transformer.blocks.N.q_proj`, ...), so their state dicts
load unchanged and without remote code. Positions are relative (RoPE), so left and right padding are equivalent.
"""

import math
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from dllmquant.models.base import NativeModel
from dllmquant.models.layers import (
    RMSNorm,
    apply_rotary,
    expand_attention_mask,
    repeat_heads,
    rotary_cos_sin,
    split_heads,
)
from dllmquant.models.llada.configuration import LLaDAConfig


class LLaDABlock(nn.Module):
    """One pre-norm block: bidirectional attention, then a SiLU-gated feed-forward layer."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.head_dim = config.d_model // config.n_heads
        qkv_bias = config.include_bias or config.include_qkv_bias
        width, kv_width, hidden = config.d_model, self.n_kv_heads * self.head_dim, config.mlp_hidden_size
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.attn_out = nn.Linear(width, width, bias=config.include_bias)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, hidden, bias=config.include_bias)
        self.up_proj = nn.Linear(width, hidden, bias=config.include_bias)
        self.ff_out = nn.Linear(hidden, width, bias=config.include_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Maps the residual stream [batch, length, d_model] to the next one.

        Args:
            x: Residual stream.
            cos: RoPE cosines, float32 [length, head_dim].
            sin: RoPE sines, float32 [length, head_dim].
            attention_mask: None, or bool broadcastable to [batch, heads, length, length], True where attended.
        """
        h = self.attn_norm(x)
        q = apply_rotary(split_heads(self.q_proj(h), self.head_dim), cos, sin)
        k = repeat_heads(apply_rotary(split_heads(self.k_proj(h), self.head_dim), cos, sin), self.n_heads)
        v = repeat_heads(split_heads(self.v_proj(h), self.head_dim), self.n_heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(-2))
        h = self.ff_norm(x)
        out: Tensor = x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))
        return out


class LLaDAModel(nn.Module):
    """The transformer body and its output matrix, under the published module names."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
                "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            }
        )
        if not config.weight_tying:
            self.transformer["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=config.include_bias)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns logits [batch, length, embedding_size] and the last hidden state for embeddings `x`."""
        config, body = self.config, self.transformer
        blocks, embedding = cast("nn.ModuleList", body["blocks"]), cast("nn.Embedding", body["wte"])
        if config.input_emb_norm:
            x = x * math.sqrt(config.d_model)
        cos, sin = rotary_cos_sin(x.shape[1], config.d_model // config.n_heads, config.rope_theta, x.device)
        for block in blocks:
            x = block(x, cos, sin, attention_mask=attention_mask)
        x = body["ln_f"](x)
        logits = F.linear(x, embedding.weight) if config.weight_tying else body["ff_out"](x)
        return (logits / math.sqrt(config.d_model) if config.scale_logits else logits), x


class LLaDAModelLM(NativeModel):
    """LLaDA with its output head: predicts the token under every `[MASK]`, attending in both directions."""

    config: LLaDAConfig
    config_class = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012 - declared so by the base class
    _supports_sdpa = True

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        embedding: nn.Module = self.model.transformer["wte"]
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.model.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output head: a linear layer, or the embedding itself when `weight_tying` is set."""
        head: nn.Module = self.model.transformer["wte" if self.config.weight_tying else "ff_out"]
        return head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        use_cache: bool = False,
        **unused: Any,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Predicts the token at every position.

        Args:
            input_ids: Token ids [batch, length]; exactly one of `input_ids` and `inputs_embeds`.
            attention_mask: Padding mask [batch, length], or bool [1 or batch, 1 or heads, length, length].
            inputs_embeds: Embeddings [batch, length, d_model].
            labels: Targets [batch, length], -100 where no loss is taken. Logits are not shifted.
            output_hidden_states: Whether to return the final (normed) hidden state.
            return_dict: Whether to return a `MaskedLMOutput` rather than a tuple.
            use_cache: Must be False: attention is bidirectional, so keys and values of a step do not survive it.
            **unused: Must be empty.

        Returns:
            Logits [batch, length, embedding_size], and the mean cross-entropy when labels are given.

        Raises:
            ValueError: Both or neither kind of input, an unknown argument, a cache, or a mask of a wrong shape.
        """
        if use_cache or any(value is not None for value in unused.values()):
            raise ValueError(f"LLaDA forward: unsupported arguments {sorted(unused)} (use_cache={use_cache})")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("LLaDA forward: give exactly one of input_ids and inputs_embeds")
        embeds = self.model.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds
        mask = expand_attention_mask(attention_mask, embeds.shape[:2], self.config.n_heads)
        logits, hidden = self.model(embeds, mask)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=(hidden,) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()
