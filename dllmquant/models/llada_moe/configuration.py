"""Configuration of the LLaDA-MoE architecture, in the published checkpoints' own keys."""

from typing import Any

from transformers import PretrainedConfig

from dllmquant.models.checks import check_variants, plain_rope_theta

# Keys that select variants no published LLaDA-MoE uses, with the only values this implementation covers.
_SUPPORTED_VARIANTS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0.0, None),
    "clip_qkv": (None,),
    "qk_layernorm": (True,),
    "partial_rotary_factor": (1, None),
    "shared_expert_intermediate_size": (None,),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_score_function": ("softmax", None),
    "tie_word_embeddings": (False,),
}


class LLaDAMoEConfig(PretrainedConfig):
    """Configuration of a LLaDA-MoE model, read from the `config.json` of the published checkpoints.

    A `config.json` that calls this architecture "llada", as the dense one, is read too (`LLaDAConfig.from_dict`). Keys
    that select a variant this library does not implement (dense or shared experts, clipped projections, ...) are
    checked when the configuration is built. The published code does not read `norm_topk_prob`, `routed_scaling_factor`
    and the groups of experts: the weights of the chosen experts are their softmax probabilities as they are.

    Args:
        vocab_size: Rows of the embedding and output matrices.
        hidden_size: Width of the residual stream.
        expert_intermediate_size: Width of an expert.
        num_hidden_layers: Number of transformer blocks.
        num_attention_heads: Number of query heads; must divide `hidden_size`.
        num_key_value_heads: Number of key/value heads; must divide `num_attention_heads`. None means as many.
        num_experts: Number of experts of a block.
        num_experts_per_tok: Number of experts that read a token.
        moe_layer_freq: For every block, 1 if it is a mixture; only mixtures are supported.
        hidden_act: Activation of the experts. Only "silu" is supported.
        max_position_embeddings: Longest sequence the configuration declares, in tokens.
        rms_norm_eps: Epsilon of the RMS norms.
        rope_theta: Base of the rotary position embedding.
        rope_parameters: The same as transformers 5 writes it, {"rope_type": "default", "rope_theta": ...}; where it
            names a base, that one counts.
        rope_scaling: Older name of `rope_parameters`.
        initializer_range: Standard deviation of freshly initialised weights.
        mask_token_id: Id of the `<|mask|>` token, which the published `config.json` does not name.
        pad_token_id: Id of the padding token, `<|endoftext|>`.
        eos_token_id: Id of the same token, which ends a text.
        **kwargs: Other keys of the published `config.json`, kept as they are.

    Raises:
        ValueError: A key asks for a variant that is not implemented, or sizes do not fit.
    """

    model_type = "lladamoe"

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        expert_intermediate_size: int = 1024,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        num_experts: int = 64,
        num_experts_per_tok: int = 8,
        moe_layer_freq: list[int] | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 8192,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 50000.0,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        mask_token_id: int = 156895,
        pad_token_id: int | None = 156892,
        eos_token_id: int | None = 156892,
        **kwargs: Any,
    ) -> None:
        check_variants("LLaDA-MoE", kwargs | {"hidden_act": hidden_act}, _SUPPORTED_VARIANTS)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.expert_intermediate_size = expert_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // max(num_attention_heads, 1)
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_layer_freq = [1] * num_hidden_layers if moe_layer_freq is None else list(moe_layer_freq)
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = plain_rope_theta("LLaDA-MoE", rope_theta, rope_parameters, rope_scaling)
        self.initializer_range = initializer_range
        self.mask_token_id = mask_token_id
        self._check_sizes()
        kwargs.pop("model_type", None)  # published as "llada"
        kwargs |= {"pad_token_id": pad_token_id, "eos_token_id": eos_token_id, "tie_word_embeddings": False}
        super().__init__(**kwargs)

    def _check_sizes(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads < 1 or self.hidden_size % (2 * heads):
            raise ValueError(
                f"LLaDA-MoE config: num_attention_heads={heads} must divide hidden_size={self.hidden_size} "
                "into even head sizes (RoPE)"
            )
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"LLaDA-MoE config: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"LLaDA-MoE config: num_experts_per_tok={self.num_experts_per_tok} is not supported; "
                f"valid: 1 to num_experts={self.num_experts}"
            )
        if self.moe_layer_freq != [1] * self.num_hidden_layers:
            raise ValueError(
                f"LLaDA-MoE config: moe_layer_freq={self.moe_layer_freq} is not supported; "
                f"valid: 1 for each of the {self.num_hidden_layers} blocks"
            )
