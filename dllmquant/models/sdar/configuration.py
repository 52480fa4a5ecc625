"""Configurations of the SDAR architectures, in the published checkpoints' own keys."""

from typing import Any

from dllmquant.models.qwen_config import BlockCausalQwenConfig

_VARIANTS: dict[str, tuple[Any, ...]] = {"attention_bias": (False, None)}


class SDARConfig(BlockCausalQwenConfig):
    """Configuration of a SDAR or TraDo model, read from the `config.json` of the published checkpoints.

    The keys are Qwen3's, as in `JetLM/SDAR-4B-Chat`, with the block length and the mask token. Keys that select a
    variant this library does not implement (sliding windows, scaled rotary positions, ...) are checked when the
    configuration is built.

    Args:
        vocab_size: Rows of the embedding and output matrices.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated feed-forward layer.
        num_hidden_layers: Number of transformer blocks.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key/value heads; must divide `num_attention_heads`. None means as many.
        head_dim: Width of a head. None means `hidden_size` / `num_attention_heads`.
        block_size: Tokens per block; `block_length` is another name of it.
        mask_token_id: Id of the `<|MASK|>` token.
        pad_token_id: Id of the padding token, `<|endoftext|>`.
        **kwargs: Other keys of the published `config.json`; see `BlockCausalQwenConfig`.

    Raises:
        ValueError: A key asks for a variant that is not implemented, or sizes do not fit.
    """

    model_type = "sdar"
    attribute_map = {"block_length": "block_size"}  # noqa: RUF012 - declared so by the base class
    family = "SDAR"
    variants = _VARIANTS
    block_key = "block_size"

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2560,
        intermediate_size: int = 9728,
        num_hidden_layers: int = 36,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 8,
        head_dim: int | None = 128,
        block_size: int = 4,
        mask_token_id: int = 151669,
        pad_token_id: int | None = 151643,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            block_length=kwargs.pop("block_length", block_size),
            mask_token_id=mask_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )


class SDARMoeConfig(BlockCausalQwenConfig):
    """Configuration of a SDAR model with mixtures of experts, as `JetLM/SDAR-30B-A3B-Chat`.

    The keys are Qwen3-MoE's, with the block length and the mask token.

    Args:
        vocab_size: Rows of the embedding and output matrices.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of a dense feed-forward layer, which no block has.
        moe_intermediate_size: Width of an expert.
        num_hidden_layers: Number of transformer blocks.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key/value heads; must divide `num_attention_heads`. None means as many.
        head_dim: Width of a head. None means `hidden_size` / `num_attention_heads`.
        num_experts: Number of experts of a block.
        num_experts_per_tok: Number of experts that read a token.
        norm_topk_prob: Whether the weights of the experts that read a token are made to sum to 1.
        block_size: Tokens per block; `block_length` is another name of it.
        mask_token_id: Id of the `<|MASK|>` token.
        pad_token_id: Id of the padding token, `<|endoftext|>`.
        **kwargs: Other keys of the published `config.json`; see `BlockCausalQwenConfig`.

    Raises:
        ValueError: A key asks for a variant that is not implemented (as dense blocks), or sizes do not fit.
    """

    model_type = "sdar_moe"
    attribute_map = {"block_length": "block_size"}  # noqa: RUF012 - declared so by the base class
    family = "SDAR-MoE"
    variants = _VARIANTS | {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
    block_key = "block_size"

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2048,
        intermediate_size: int = 6144,
        moe_intermediate_size: int = 768,
        num_hidden_layers: int = 48,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 4,
        head_dim: int | None = 128,
        num_experts: int = 128,
        num_experts_per_tok: int = 8,
        norm_topk_prob: bool = True,
        block_size: int = 4,
        mask_token_id: int = 151669,
        pad_token_id: int | None = 151643,
        **kwargs: Any,
    ) -> None:
        self.moe_intermediate_size = moe_intermediate_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(
                f"SDAR-MoE config: num_experts_per_tok={num_experts_per_tok} is not supported; "
                f"valid: 1 to num_experts={num_experts}"
            )
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            block_length=kwargs.pop("block_length", block_size),
            mask_token_id=mask_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )
