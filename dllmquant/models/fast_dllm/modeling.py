"""The Fast-dLLM v2 architecture for transformers 5: Qwen2's blocks, attending block by block.

Module names are those of the published checkpoints (`model.layers.N.self_attn.q_proj`, ...), so their state dicts load
unchanged and without remote code. Logits are Qwen2's: those at a position predict the *next* one.

Deviations from the published code:
    1. It attends block by block without padding only; here blocks are counted from the first real token of a padding
       mask. A boolean four-dimensional mask is used as given.
    2. In float16 and bfloat16, queries and keys are rotated in float32, where that code rounds the rotary tables.
"""

from dllmquant.models.fast_dllm.configuration import FastDLLMConfig
from dllmquant.models.layers import GatedMLP
from dllmquant.models.qwen import BlockCausalQwen, QwenBlock


class Fast_dLLM_QwenForCausalLM(BlockCausalQwen):
    """Fast-dLLM v2 with its output head: the logits at a position predict the token at the next one."""

    config: FastDLLMConfig
    config_class = FastDLLMConfig

    def __init__(self, config: FastDLLMConfig) -> None:
        mlps = [GatedMLP(config.hidden_size, config.intermediate_size) for _ in range(config.num_hidden_layers)]
        super().__init__(config, [QwenBlock(config, mlp, qkv_bias=True, qk_norm=False) for mlp in mlps])
