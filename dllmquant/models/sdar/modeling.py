"""The SDAR architectures for transformers 5: Qwen3's blocks, dense or mixtures of experts, attending block by block.

Module names are those of the published checkpoints (`model.layers.N.self_attn.q_proj`, ...), so their state dicts load
unchanged and without remote code. TraDo is SDAR, trained further.

Deviations from the published code:
    1. Its caller gives the block-causal mask; here the model makes it from a padding mask or from none. A boolean
       four-dimensional mask is used as given.
    2. In float16 and bfloat16, queries and keys are rotated, and the experts' outputs weighted and summed, in float32,
       where that code rounds the rotary tables, the weights and every partial sum.
"""

from dllmquant.models.layers import GatedMLP
from dllmquant.models.qwen import BlockCausalQwen, QwenBlock, QwenMixture
from dllmquant.models.sdar.configuration import SDARConfig, SDARMoeConfig


class SDARForCausalLM(BlockCausalQwen):
    """SDAR with its output head: predicts the token under every mask of a block from it and the blocks before."""

    config: SDARConfig
    config_class = SDARConfig

    def __init__(self, config: SDARConfig) -> None:
        mlps = [GatedMLP(config.hidden_size, config.intermediate_size) for _ in range(config.num_hidden_layers)]
        super().__init__(config, [QwenBlock(config, mlp, qkv_bias=False, qk_norm=True) for mlp in mlps])


class SDARMoeForCausalLM(BlockCausalQwen):
    """SDAR whose feed-forward layers are mixtures of experts."""

    config: SDARMoeConfig
    config_class = SDARMoeConfig

    def __init__(self, config: SDARMoeConfig) -> None:
        mlps = [
            QwenMixture(
                config.hidden_size,
                config.moe_intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                normed=config.norm_topk_prob,
            )
            for _ in range(config.num_hidden_layers)
        ]
        super().__init__(config, [QwenBlock(config, mlp, qkv_bias=False, qk_norm=True) for mlp in mlps])
