"""Configuration of the Fast-dLLM v2 architecture, in the published checkpoints' own keys."""

from typing import Any

from dllmquant.models.qwen_config import BlockCausalQwenConfig


class FastDLLMConfig(BlockCausalQwenConfig):
    """Configuration of a Fast-dLLM v2 model, read from the `config.json` of the published checkpoints.

    The keys are Qwen2's, as in `Efficient-Large-Model/Fast_dLLM_v2_7B`, with the block length. Keys that select a
    variant this library does not implement (sliding windows, scaled rotary positions, ...) are checked when the
    configuration is built.

    Args:
        vocab_size: Rows of the embedding and output matrices.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated feed-forward layer.
        num_hidden_layers: Number of transformer blocks.
        num_attention_heads: Number of query heads; must divide `hidden_size`.
        num_key_value_heads: Number of key/value heads; must divide `num_attention_heads`. None means as many.
        bd_size: Tokens per block; `block_length` is another name of it.
        layer_types: For every block, "full_attention"; nothing else is supported.
        mask_token_id: Id of the `|<MASK>|` token, which the published `config.json` does not name.
        pad_token_id: Id of the padding token, `<|endoftext|>`.
        **kwargs: Other keys of the published `config.json`; see `BlockCausalQwenConfig`.

    Raises:
        ValueError: A key asks for a variant that is not implemented, or sizes do not fit.
    """

    model_type = "Fast_dLLM_Qwen"
    attribute_map = {"block_length": "bd_size"}  # noqa: RUF012 - declared so by the base class
    family = "Fast-dLLM v2"
    variants = {"attention_bias": (True, None)}  # noqa: RUF012 - a class attribute, never changed
    block_key = "bd_size"

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        bd_size: int = 32,
        layer_types: list[str] | None = None,
        mask_token_id: int = 151665,
        pad_token_id: int | None = 151643,
        **kwargs: Any,
    ) -> None:
        self.layer_types = ["full_attention"] * num_hidden_layers if layer_types is None else list(layer_types)
        if self.layer_types != ["full_attention"] * num_hidden_layers:
            raise ValueError(
                f"Fast-dLLM v2 config: layer_types={self.layer_types} is not supported; "
                f"valid: 'full_attention' for each of the {num_hidden_layers} blocks"
            )
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise ValueError(
                f"Fast-dLLM v2 config: num_attention_heads={num_attention_heads} must divide hidden_size={hidden_size}"
            )
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=kwargs.pop("head_dim", None),
            block_length=kwargs.pop("block_length", bd_size),
            mask_token_id=mask_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )
