"""The LLaDA-MoE architecture for transformers 5: Qwen3-MoE's blocks, attending in both directions.

Module names are those of the published checkpoints (`model.layers.N.mlp.experts.E.gate_proj`, ...), so their state
dicts load unchanged and without remote code. Positions are relative (RoPE), so left and right padding are equivalent.

Deviations from the published code, in float16 and bfloat16 only: queries and keys are rotated, and the experts'
outputs weighted and summed, in float32, where that code rounds the rotary tables, the weights and every partial sum.
"""

from torch import nn

from dllmquant.models.llada_moe.configuration import LLaDAMoEConfig
from dllmquant.models.masked_lm import NativeMaskedLM
from dllmquant.models.qwen import QwenBlock, QwenBody, QwenMixture


class LLaDAMoEModelLM(NativeMaskedLM):
    """LLaDA-MoE with its output head: predicts the token under every mask, attending in both directions."""

    config: LLaDAMoEConfig
    config_class = LLaDAMoEConfig
    _no_split_modules = ["QwenBlock"]  # noqa: RUF012 - declared so by the base class

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config)
        mixtures = [
            QwenMixture(
                config.hidden_size,
                config.expert_intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                normed=False,
            )
            for _ in range(config.num_hidden_layers)
        ]
        blocks = [QwenBlock(config, mixture, qkv_bias=False, qk_norm=True) for mixture in mixtures]
        self.model = QwenBody(config, blocks)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]
