"""The Dream architecture for transformers 5: Qwen2's blocks, attending in both directions.

Module names are those of the published checkpoints (`model.layers.N.self_attn.q_proj`, ...), so their state dicts load
unchanged and without remote code. Positions are relative (RoPE), so left and right padding are equivalent. Logits are
Qwen2's: those at a position predict the *next* one; `ModelAdapter.denoiser` aligns them.

Deviation from the published code: queries and keys are rotated in float32 whatever the model's dtype, where that code
rounds the rotary tables to it.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from dllmquant.models.base import NativeModel
from dllmquant.models.dream.configuration import DreamConfig
from dllmquant.models.layers import (
    GatedMLP,
    RMSNorm,
    expand_attention_mask,
    rotary_cos_sin,
)
from dllmquant.models.qwen import QwenAttention


class DreamBlock(nn.Module):
    """One pre-norm block: attention, then the feed-forward layer."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.self_attn = QwenAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.hidden_size // config.num_attention_heads,
            qkv_bias=True,
        )
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Maps the residual stream [batch, length, hidden_size] to the next one.

        Args:
            x: Residual stream.
            cos: RoPE cosines, float32 [length, head_dim].
            sin: RoPE sines, float32 [length, head_dim].
            attention_mask: None, or bool broadcastable to [batch, heads, length, length], True where attended.
        """
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention_mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DreamBody(nn.Module):
    """Embedding, blocks and final norm, under the published module names."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Returns the last hidden state, normed, for embeddings `x` [batch, length, hidden_size]."""
        config = self.config
        head_dim = config.hidden_size // config.num_attention_heads
        cos, sin = rotary_cos_sin(x.shape[1], head_dim, config.rope_theta, x.device)
        for block in self.layers:
            x = block(x, cos, sin, attention_mask=attention_mask)
        out: Tensor = self.norm(x)
        return out


class DreamModel(NativeModel):
    """Dream with its output head: the logits at a position predict the token at the next one."""

    config: DreamConfig
    config_class = DreamConfig
    base_model_prefix = "model"
    _no_split_modules = ["DreamBlock"]  # noqa: RUF012 - declared so by the base class
    _supports_sdpa = True
    diffusion_generate: ClassVar[Callable[..., Any]]  # dllmquant.models.dream.generation attaches it

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.model = DreamBody(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        embedding: nn.Module = self.model.embed_tokens
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output head: a linear layer, or the embedding itself when `tie_word_embeddings` is set."""
        head: nn.Module = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        use_cache: bool = False,
        **unused: Any,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Predicts the token after every position.

        Args:
            input_ids: Token ids [batch, length]; exactly one of `input_ids` and `inputs_embeds`.
            attention_mask: Padding mask [batch, length], or bool [1 or batch, 1 or heads, length, length].
            inputs_embeds: Embeddings [batch, length, hidden_size].
            output_hidden_states: Whether to return the final (normed) hidden state.
            return_dict: Whether to return a `MaskedLMOutput` rather than a tuple.
            use_cache: Must be False: attention is bidirectional, so keys and values of a step do not survive it.
            **unused: Must be empty.

        Returns:
            Logits [batch, length, vocab_size]; those at position j predict the token at j + 1.

        Raises:
            ValueError: Both or neither kind of input, an unknown argument, a cache, or a mask of a wrong shape.
        """
        if use_cache or any(value is not None for value in unused.values()):
            raise ValueError(f"Dream forward: unsupported arguments {sorted(unused)} (use_cache={use_cache})")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Dream forward: give exactly one of input_ids and inputs_embeds")
        embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = expand_attention_mask(attention_mask, embeds.shape[:2], self.config.num_attention_heads)
        hidden = self.model(embeds, mask)
        tied = self.config.tie_word_embeddings
        logits = F.linear(hidden, self.model.embed_tokens.weight) if tied else self.lm_head(hidden)
        output = MaskedLMOutput(logits=logits, hidden_states=(hidden,) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()
