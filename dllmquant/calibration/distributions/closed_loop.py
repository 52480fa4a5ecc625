"""Closed loop: states of the *quantized* model's own denoising runs.

The error of a step contains that of the steps before it (DLLMQuant, arXiv 2508.14090), so a quantized model decodes
through states that the original never visits. A second pass calibrates on them: quantize the original, record the
quantized model, and quantize the original once more with these states. Everything that is fitted to states is fitted
anew, from the original weights: transforms, activation bits and solvers; nothing is left of the first pass but the
states. Only the recording model differs from `trajectory_states`; the confidences are those of the quantized model too.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.calibration.distributions.base import Drawn, Request
from dllmquant.calibration.distributions.trajectory import trajectory_states
from dllmquant.calibration.prompts import Prompt
from dllmquant.nn.linear import QuantLinear


def closed_loop_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], request: Request
) -> Drawn:
    """Selects states of a quantized model's denoising runs, as TMAS selects those of the original.

    Args:
        model: The quantized model of the first pass.
        tokenizer: Its tokenizer.
        prompts: As for `trajectory_states`.
        request: As for `trajectory_states`.

    Raises:
        ValueError: The model is not quantized, so that its states would be those of "trajectory"; or as
            `trajectory_states`.
        OSError: The cache directory cannot be made.
    """
    if not any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError(
            "states 'closed_loop': the model holds no quantized layer; record the quantized model of a first pass, "
            "or use 'trajectory'"
        )
    return trajectory_states(model, tokenizer, prompts, request)
