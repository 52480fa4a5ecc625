"""Configuration of the LLaDA architecture, in the published checkpoints' own keys."""

from typing import Any

from transformers import PretrainedConfig

from dllmquant.models.checks import check_variants
from dllmquant.models.llada_moe.configuration import LLaDAMoEConfig

# Keys that select architecture variants no published LLaDA uses, with the only value this implementation covers.
_SUPPORTED_VARIANTS: dict[str, tuple[Any, ...]] = {
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "rope": (True, None),
    "activation_type": ("silu",),
    "layer_norm_with_affine": (True, None),
    "bias_for_layer_norm": (False, None),
    "clip_qkv": (None,),
}


class LLaDAConfig(PretrainedConfig):
    """Configuration of a LLaDA model, read from the `config.json` of the published checkpoints.

    The keys are OLMo's, as in `GSAI-ML/LLaDA-8B-Instruct`. Keys that select a variant this library does not implement
    (ALiBi, sequential blocks, query-key normalisation, ...) are checked when the configuration is built.

    Args:
        d_model: Width of the residual stream.
        n_layers: Number of transformer blocks.
        n_heads: Number of query heads; must divide `d_model`.
        n_kv_heads: Number of key/value heads; must divide `n_heads`. None means `n_heads`.
        mlp_hidden_size: Width of the gated feed-forward layer. None means `mlp_ratio * d_model`.
        mlp_ratio: Used only when `mlp_hidden_size` is None.
        vocab_size: Number of tokens of the tokenizer.
        embedding_size: Rows of the embedding and output matrices (at least `vocab_size`). None means `vocab_size`.
        max_sequence_length: Longest sequence the model was trained for, in tokens.
        rope_theta: Base of the rotary position embedding.
        rope_full_precision: Whether rotations are computed in float32. Only True is supported.
        rms_norm_eps: Epsilon of the RMS norms.
        weight_tying: Whether the output matrix is the embedding matrix.
        include_bias: Whether every linear layer has a bias.
        include_qkv_bias: Whether the query, key and value projections have a bias.
        input_emb_norm: Whether embeddings are multiplied by √d_model.
        scale_logits: Whether logits are divided by √d_model.
        init_std: Standard deviation of freshly initialised weights.
        mask_token_id: Id of the `[MASK]` token.
        **kwargs: Other keys of the published `config.json`, kept as they are.

    Raises:
        ValueError: A key asks for a variant that is not implemented, or sizes do not divide.
    """

    model_type = "llada"
    attribute_map = {  # noqa: RUF012 - the base class declares it a plain class attribute
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        mlp_hidden_size: int | None = None,
        mlp_ratio: int = 4,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        max_sequence_length: int = 4096,
        rope_theta: float = 500000.0,
        rope_full_precision: bool = True,
        rms_norm_eps: float = 1e-5,
        weight_tying: bool = False,
        include_bias: bool = False,
        include_qkv_bias: bool = False,
        input_emb_norm: bool = False,
        scale_logits: bool = False,
        init_std: float = 0.02,
        mask_token_id: int = 126336,
        **kwargs: Any,
    ) -> None:
        check_variants("LLaDA", kwargs, _SUPPORTED_VARIANTS)
        if not rope_full_precision:
            raise ValueError("LLaDA config: rope_full_precision=False is not supported; valid: True")
        if kwargs.pop("multi_query_attention", None) and n_kv_heads is None:
            n_kv_heads = 1
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.mlp_hidden_size = mlp_ratio * d_model if mlp_hidden_size is None else mlp_hidden_size
        self.vocab_size = vocab_size
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        self.max_sequence_length = max_sequence_length
        self.rope_theta = rope_theta
        self.rope_full_precision = rope_full_precision
        self.rms_norm_eps = rms_norm_eps
        self.weight_tying = weight_tying
        self.include_bias = include_bias
        self.include_qkv_bias = include_qkv_bias
        self.input_emb_norm = input_emb_norm
        self.scale_logits = scale_logits
        self.init_std = init_std
        self.mask_token_id = mask_token_id
        if n_heads < 1 or d_model % (2 * n_heads):
            raise ValueError(
                f"LLaDA config: n_heads={n_heads} must divide d_model={d_model} into even head sizes (RoPE)"
            )
        if self.n_kv_heads < 1 or n_heads % self.n_kv_heads:
            raise ValueError(f"LLaDA config: n_kv_heads={self.n_kv_heads} must divide n_heads={n_heads}")
        if self.embedding_size < vocab_size:
            raise ValueError(f"LLaDA config: embedding_size={embedding_size} is below vocab_size={vocab_size}")
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Builds the configuration a `config.json` describes.

        Args:
            config_dict: Its content. Published LLaDA-MoE checkpoints have the model type of LLaDA, too.
            **kwargs: As for `PretrainedConfig.from_dict`.

        Returns:
            A `LLaDAConfig`, or a `LLaDAMoEConfig` where the content describes experts.

        Raises:
            ValueError: As the class of the configuration does.
        """
        if config_dict.get("num_experts") is not None:
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)
