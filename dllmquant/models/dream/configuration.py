"""Configuration of the Dream architecture, in the published checkpoints' own keys."""

from typing import Any

from transformers import PretrainedConfig

from dllmquant.models.checks import check_variants, plain_rope_theta

# Keys that select variants no published Dream uses, with the only values this implementation covers.
_SUPPORTED_VARIANTS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "attention_bias": (True, None),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
}


class DreamConfig(PretrainedConfig):
    """Configuration of a Dream model, read from the `config.json` of the published checkpoints.

    The keys are Qwen2's, as in `Dream-org/Dream-v0-Instruct-7B` and `apple/DiffuCoder-7B-Instruct`. Keys that select a
    variant this library does not implement (sliding windows, scaled rotary positions, ...) are checked when the
    configuration is built.

    Args:
        vocab_size: Rows of the embedding and output matrices.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated feed-forward layer.
        num_hidden_layers: Number of transformer blocks.
        num_attention_heads: Number of query heads; must divide `hidden_size`.
        num_key_value_heads: Number of key/value heads; must divide `num_attention_heads`. None means as many.
        hidden_act: Activation of the feed-forward layer. Only "silu" is supported.
        max_position_embeddings: Longest sequence the configuration declares, in tokens.
        rms_norm_eps: Epsilon of the RMS norms.
        rope_theta: Base of the rotary position embedding.
        rope_parameters: The same as transformers 5 writes it, {"rope_type": "default", "rope_theta": ...}; where it
            names a base, that one counts.
        rope_scaling: Older name of `rope_parameters`.
        attention_dropout: Dropout of attention probabilities. Only 0 is supported.
        initializer_range: Standard deviation of freshly initialised weights.
        mask_token_id: Id of the `<|mask|>` token.
        pad_token_id: Id of the padding token, `<|endoftext|>`.
        tie_word_embeddings: Whether the output matrix is the embedding matrix.
        **kwargs: Other keys of the published `config.json`, kept as they are.

    Raises:
        ValueError: A key asks for a variant that is not implemented, or sizes do not divide.
    """

    model_type = "Dream"

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        hidden_act: str = "silu",
        max_position_embeddings: int = 131072,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1000000.0,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        mask_token_id: int = 151666,
        pad_token_id: int | None = 151643,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        variants = kwargs | {"hidden_act": hidden_act, "attention_dropout": attention_dropout}
        check_variants("Dream", variants, _SUPPORTED_VARIANTS)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = plain_rope_theta("Dream", rope_theta, rope_parameters, rope_scaling)
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.mask_token_id = mask_token_id
        if num_attention_heads < 1 or hidden_size % (2 * num_attention_heads):
            raise ValueError(
                f"Dream config: num_attention_heads={num_attention_heads} must divide hidden_size={hidden_size} "
                "into even head sizes (RoPE)"
            )
        if self.num_key_value_heads < 1 or num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"Dream config: num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={num_attention_heads}"
            )
        kwargs |= {"pad_token_id": pad_token_id, "tie_word_embeddings": tie_word_embeddings}
        super().__init__(**kwargs)
