"""`DLLMQuantizer`: a recipe applied to a model, in the shape Optimum gives quantizers."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from optimum.quantization_base import OptimumQuantizer
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dllmquant._version import __version__
from dllmquant.calibration import (
    CalibrationStates,
    Prompt,
    builtin_prompts,
    check_prompts,
    collect_states,
    prompts_needed,
)
from dllmquant.integrations.transformers import DLLMQuantConfig, DLLMQuantHfQuantizer
from dllmquant.models import ModelAdapter, adapter_for
from dllmquant.nn.linear import QuantLinear
from dllmquant.pipeline import LayerReport, Plan, make_plan, quantize_blocks
from dllmquant.recipe import Recipe

logger = logging.getLogger(__name__)


class DLLMQuantizer(OptimumQuantizer):  # type: ignore[misc]
    """Quantizes diffusion LLMs by a recipe.

        model = AutoModel.from_pretrained(dllmquant.bundled("llada-tiny"))
        DLLMQuantizer("dllmquant-w4a4").quantize(model).save_pretrained("out")

    Attributes:
        recipe: The resolved recipe.
        reports: After `quantize`: one `LayerReport` per packed layer, in execution order.
        states: After `quantize`: the calibration states, or None for data-free recipes.
    """

    def __init__(self, recipe: Recipe | str | Path | dict[str, Any]) -> None:
        """Loads the recipe.

        Args:
            recipe: A recipe, the name of a built-in one, the path of a YAML file, or a dictionary.

        Raises:
            RecipeError: The recipe is not valid.
        """
        self.recipe = Recipe.load(recipe)
        self.reports: list[LayerReport] = []
        self.states: CalibrationStates | None = None
        self._model: PreTrainedModel | str | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: PreTrainedModel | str | Path,
        file_name: str | None = None,
        *,
        recipe: Recipe | str | Path | dict[str, Any] = "dllmquant-w4a4",
    ) -> Self:
        """Binds a quantizer to a model, as Optimum's quantizers do; `quantize(save_dir=...)` then needs no model.

        Raises:
            RecipeError: The recipe is not valid.
            ValueError: `file_name` was given; checkpoints are directories.
        """
        if file_name is not None:
            raise ValueError(f"file_name={file_name!r}: dllmquant reads whole checkpoint directories; leave it None")
        quantizer = cls(recipe)
        quantizer._model = model_or_path if isinstance(model_or_path, PreTrainedModel) else str(model_or_path)
        return quantizer

    def quantize(
        self,
        model: PreTrainedModel | str | Path | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompts: Sequence[Prompt] | None = None,
        seed: int | None = None,
        save_dir: str | Path | None = None,
        file_prefix: str | None = None,
        progress: bool = True,
    ) -> PreTrainedModel:
        """Quantizes a model **in place** and returns it: no second copy is made.

        If anything fails before the first block is solved, the model is left as it was.

        Args:
            model: The 16- or 32-bit model, or the path or hub id of one; None uses the one of `from_pretrained`.
            tokenizer: Its tokenizer; None loads the one saved with the model.
            prompts: Calibration prompts, or (prompt, completion) pairs, in your own domain; None uses built-in
                word problems, programs and stories.
            seed: Replaces the recipe's seed.
            save_dir: Where to save model and tokenizer; None saves nothing.
            file_prefix: Must be None; part of Optimum's signature.
            progress: Whether to show progress bars.

        Returns:
            The same model object, its linear layers packed; `save_pretrained` writes a checkpoint that
            `AutoModel.from_pretrained` reads back bit-identically.

        Raises:
            RecipeError: The recipe does not fit the model.
            ValueError: The model is not a known diffusion LLM, is quantized already or holds NaN; there are too few
                prompts; or a solver failed.
        """
        if file_prefix is not None:
            raise ValueError(f"file_prefix={file_prefix!r}: transformers names checkpoint files; leave it None")
        target = self._loaded(model)
        adapter, plan = self._checked(target)
        recipe = self.recipe if seed is None else Recipe.load(self.recipe.to_dict() | {"seed": seed})
        settings = recipe.calibration
        if settings is not None:
            tokenizer = tokenizer or _saved_tokenizer(target)
            if prompts is None:
                logger.info("no calibration prompts given: using built-in word problems, programs and stories")
                prompts = builtin_prompts(prompts_needed(settings), recipe.seed)
            check_prompts(prompts, prompts_needed(settings))
        elif prompts is not None:
            raise ValueError(f"prompts: recipe {recipe.name!r} uses no calibration data; leave prompts None")

        was_training = target.training
        target.eval()
        try:
            states = None
            if settings is not None:
                assert tokenizer is not None
                assert prompts is not None
                states = collect_states(
                    target, tokenizer, prompts, settings, recipe.token_weights, seed=recipe.seed, progress=progress
                )
            self.reports = quantize_blocks(
                target,
                adapter,
                plan,
                recipe.weights,
                states,
                batch_size=settings.batch_size if settings is not None else 1,
                progress=progress,
            )
        finally:
            target.train(was_training)
        self.states = states
        _attach_config(target, plan, recipe, states)
        if save_dir is not None:
            target.save_pretrained(save_dir)
            (tokenizer or _saved_tokenizer(target)).save_pretrained(save_dir)
        return target

    def _loaded(self, model: PreTrainedModel | str | Path | None) -> PreTrainedModel:
        model = self._model if model is None else model
        if model is None:
            raise ValueError("model: none given; pass one, or bind one with DLLMQuantizer.from_pretrained")
        if isinstance(model, str | Path):
            loaded: PreTrainedModel = AutoModel.from_pretrained(str(model))
            return loaded
        return model

    def _checked(self, model: PreTrainedModel) -> tuple[ModelAdapter, Plan]:
        """Checks that this recipe can be applied to this model."""
        if getattr(model.config, "quantization_config", None) is not None or any(
            isinstance(module, QuantLinear) for module in model.modules()
        ):
            raise ValueError("model: it is quantized already; load the 16-bit original")
        adapter = adapter_for(model)
        return adapter, make_plan(model, adapter, self.recipe)


def _saved_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Loads the tokenizer saved with the model."""
    path = model.config._name_or_path
    if not path:
        raise ValueError("tokenizer: the model was not loaded from a checkpoint; pass tokenizer=")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: none can be loaded from {path!r}; pass tokenizer= ({error})") from error
    return tokenizer


def _attach_config(model: PreTrainedModel, plan: Plan, recipe: Recipe, states: CalibrationStates | None) -> None:
    """Makes the model a quantized transformers model: `save_pretrained` then writes all that a reload needs."""
    scheme = {
        "weight": {
            "bits": plan.grid.bits,
            "group_size": plan.grid.group_size,
            "symmetric": plan.grid.symmetric,
        },
        "activation": None
        if plan.activation is None
        else {
            "bits": plan.activation.bits,
            "group_size": plan.activation.group_size,
            "symmetric": plan.activation.symmetric,
        },
    }
    config = DLLMQuantConfig(
        modules={name: scheme for name in plan.modules},
        recipe=recipe.to_dict(),
        library_version=__version__,
        seed=recipe.seed,
        states_hash=None if states is None else states.content_hash(),
    )
    model.config.quantization_config = config
    # transformers sets these two on models it loads quantized; its annotations know modules and tensors only.
    model.hf_quantizer = DLLMQuantHfQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.config.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
