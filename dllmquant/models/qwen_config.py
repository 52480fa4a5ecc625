"""What the configurations of block-causal families with Qwen's blocks have in common, in Qwen's own keys."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

from dllmquant.models.checks import check_variants, plain_rope_theta

# Keys that select variants no published checkpoint uses, with the only values this implementation covers.
_SUPPORTED_VARIANTS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, None),
    "use_sliding_window": (False, None),
}


class BlockCausalQwenConfig(PretrainedConfig):
    """Keys of Qwen's `config.json`. Abstract: families derive from it, and name the key of the block length.

    Attributes:
        family: Name of the family, for messages.
        variants: Keys that select variants of the family, with the values that are implemented.
        block_key: Key of the block length; `block_length` is another name of it.
    """

    family: ClassVar[str]
    variants: ClassVar[dict[str, tuple[Any, ...]]] = {}
    block_key: ClassVar[str]

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int | None,
        head_dim: int | None,
        block_length: int,
        mask_token_id: int,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1000000.0,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        """Reads the keys, which mean what they mean to Qwen.

        Args:
            vocab_size: Rows of the embedding and output matrices.
            hidden_size: Width of the residual stream.
            intermediate_size: Width of the gated feed-forward layer.
            num_hidden_layers: Number of transformer blocks.
            num_attention_heads: Number of query heads.
            num_key_value_heads: Number of key/value heads; must divide `num_attention_heads`. None means as many.
            head_dim: Width of a head, even. None means `hidden_size` / `num_attention_heads`.
            block_length: Tokens per block: a token attends to its own block and to earlier ones.
            mask_token_id: Id of the mask token.
            hidden_act: Activation of the feed-forward layer. Only "silu" is supported.
            max_position_embeddings: Longest sequence the configuration declares, in tokens.
            rms_norm_eps: Epsilon of the RMS norms.
            rope_theta: Base of the rotary position embedding.
            rope_parameters: The same as transformers 5 writes it, {"rope_type": "default", "rope_theta": ...}; where
                it names a base, that one counts.
            rope_scaling: Older name of `rope_parameters`.
            attention_dropout: Dropout of attention probabilities. Only 0 is supported.
            initializer_range: Standard deviation of freshly initialised weights.
            tie_word_embeddings: Whether the output matrix is the embedding matrix.
            **kwargs: Other keys, kept as they are.

        Raises:
            ValueError: A key asks for a variant that is not implemented, or sizes do not fit.
        """
        given = kwargs | {"hidden_act": hidden_act, "attention_dropout": attention_dropout}
        check_variants(self.family, given, _SUPPORTED_VARIANTS | self.variants)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // max(num_attention_heads, 1) if head_dim is None else head_dim
        self.block_length = block_length
        self.mask_token_id = mask_token_id
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = plain_rope_theta(self.family, rope_theta, rope_parameters, rope_scaling)
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self._check_sizes()
        kwargs.pop("attn_implementation", None)  # SDAR's config.json names one for its own code
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)

    def _check_sizes(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if min(heads, kv_heads) < 1 or heads % kv_heads:
            raise ValueError(
                f"{self.family} config: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"{self.family} config: head_dim={self.head_dim} is not supported; valid: an even number (RoPE)"
            )
        if self.block_length < 1:
            raise ValueError(
                f"{self.family} config: {self.block_key}={self.block_length} is not supported; valid: at least 1"
            )
