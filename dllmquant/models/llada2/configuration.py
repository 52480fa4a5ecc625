"""Configuration of the LLaDA2 architecture, in the published checkpoints' own keys."""

from typing import Any

from transformers import PretrainedConfig

from dllmquant.models.checks import check_variants, plain_rope_theta

# Keys that select variants no published LLaDA2 uses, with the only values this implementation covers.
_SUPPORTED_VARIANTS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_qkv_bias": (False, None),
    "use_bias": (False, None),
    "use_qk_norm": (True,),
    "use_sliding_window": (False, None),
    "norm_head": (False, None),
    "score_function": ("sigmoid", None),
    "norm_topk_prob": (True, None),
    "moe_router_enable_expert_bias": (True, None),
    "router_dtype": ("fp32", None),
    "tie_word_embeddings": (False,),
}


class LLaDA2MoeConfig(PretrainedConfig):
    """Configuration of a LLaDA2 model, read from the `config.json` of the published checkpoints.

    Keys that select a variant this library does not implement (biases, sliding windows, other routers, ...) are checked
    when the configuration is built.

    Args:
        vocab_size: Rows of the embedding and output matrices.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layer of the first, dense blocks.
        moe_intermediate_size: Width of an expert.
        num_hidden_layers: Number of transformer blocks.
        first_k_dense_replace: How many of them, from the first on, are dense: at least one and not all.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key/value heads; must divide `num_attention_heads`. None means as many.
        head_dim: Width of a head. None means `hidden_size` / `num_attention_heads`.
        partial_rotary_factor: Share of a head's width that is rotated by the position.
        num_experts: Number of experts of a mixture block, besides the shared ones.
        num_shared_experts: Experts that read every token; together they are one of this many times the width.
        num_experts_per_tok: Number of experts that read a token.
        n_group: Number of groups of experts; must divide `num_experts` into groups of at least two.
        topk_group: Number of groups from which a token's experts are chosen.
        routed_scaling_factor: Sum of the weights of a token's experts.
        block_length: Tokens per block: a token attends to its own block and to earlier ones. Not a published key; the
            published sampler assumes 32.
        hidden_act: Activation of the feed-forward layers. Only "silu" is supported.
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

    model_type = "llada2_moe"

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        intermediate_size: int = 5120,
        moe_intermediate_size: int = 512,
        num_hidden_layers: int = 20,
        first_k_dense_replace: int = 1,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = 4,
        head_dim: int | None = None,
        partial_rotary_factor: float = 0.5,
        num_experts: int = 256,
        num_shared_experts: int = 1,
        num_experts_per_tok: int = 8,
        n_group: int = 8,
        topk_group: int = 4,
        routed_scaling_factor: float = 2.5,
        block_length: int = 32,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 600000.0,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        mask_token_id: int = 156895,
        pad_token_id: int | None = 156892,
        eos_token_id: int | None = 156892,
        **kwargs: Any,
    ) -> None:
        check_variants("LLaDA2", kwargs | {"hidden_act": hidden_act}, _SUPPORTED_VARIANTS)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.first_k_dense_replace = first_k_dense_replace
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.partial_rotary_factor = partial_rotary_factor
        self.num_experts = num_experts
        self.num_shared_experts = num_shared_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.n_group = n_group
        self.topk_group = topk_group
        self.routed_scaling_factor = routed_scaling_factor
        self.block_length = block_length
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = plain_rope_theta("LLaDA2", rope_theta, rope_parameters, rope_scaling)
        self.initializer_range = initializer_range
        self.mask_token_id = mask_token_id
        self.head_dim = hidden_size // max(num_attention_heads, 1) if head_dim is None else head_dim
        self._check_sizes()
        self._check_mixture()
        kwargs |= {"pad_token_id": pad_token_id, "eos_token_id": eos_token_id, "tie_word_embeddings": False}
        super().__init__(**kwargs)

    @property
    def rotated_width(self) -> int:
        """How much of a head's width is rotated by the position: its first components."""
        return int(self.head_dim * self.partial_rotary_factor)

    def _check_sizes(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if min(heads, kv_heads) < 1 or heads % kv_heads:
            raise ValueError(f"LLaDA2 config: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}")
        if not 2 <= self.rotated_width <= self.head_dim or self.rotated_width % 2:
            raise ValueError(
                f"LLaDA2 config: partial_rotary_factor={self.partial_rotary_factor} rotates {self.rotated_width} "
                f"of head_dim={self.head_dim}; valid: an even number of at least 2, at most all"
            )
        if self.block_length < 1:
            raise ValueError(f"LLaDA2 config: block_length={self.block_length} is not supported; valid: at least 1")

    def _check_mixture(self) -> None:
        dense, blocks = self.first_k_dense_replace, self.num_hidden_layers
        if not 1 <= dense < blocks:
            raise ValueError(
                f"LLaDA2 config: first_k_dense_replace={dense} is not supported; "
                f"valid: at least 1, less than num_hidden_layers={blocks}"
            )
        experts, groups = self.num_experts, self.n_group
        if groups < 1 or experts % groups or experts < 2 * groups:
            raise ValueError(
                f"LLaDA2 config: n_group={groups} must divide num_experts={experts} into groups of at least two"
            )
        if not 1 <= self.topk_group <= groups:
            raise ValueError(
                f"LLaDA2 config: topk_group={self.topk_group} is not supported; valid: 1 to n_group={groups}"
            )
        available = self.topk_group * experts // groups
        if not 1 <= self.num_experts_per_tok <= available:
            raise ValueError(
                f"LLaDA2 config: num_experts_per_tok={self.num_experts_per_tok} is not supported; "
                f"valid: 1 to {available}, the experts of {self.topk_group} groups"
            )
        if self.num_shared_experts is None or self.num_shared_experts < 1:
            raise ValueError(
                f"LLaDA2 config: num_shared_experts={self.num_shared_experts} is not supported; valid: at least 1"
            )
