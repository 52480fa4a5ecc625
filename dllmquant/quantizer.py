"""`DLLMQuantizer`: a recipe applied to a model, in the shape Optimum gives quantizers."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from optimum.quantization_base import OptimumQuantizer
from safetensors import safe_open
from safetensors.torch import save_file
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
from dllmquant.integrations.transformers import (
    DLLMQuantConfig,
    DLLMQuantHfQuantizer,
    describe_attention,
    describe_layer,
)
from dllmquant.models import ModelAdapter, adapter_for
from dllmquant.nn.attention import installed, uninstall
from dllmquant.nn.linear import QuantLinear
from dllmquant.pipeline import LayerReport, quantize_blocks
from dllmquant.plan import Plan, make_plan
from dllmquant.preparation import Preparation, SiteBits, block_token_weights, prepare
from dllmquant.recipe import Recipe
from dllmquant.settings import FoldedTransforms

logger = logging.getLogger(__name__)


class DLLMQuantizer(OptimumQuantizer):  # type: ignore[misc]
    """Quantizes diffusion LLMs by a recipe.

        model = AutoModel.from_pretrained(dllmquant.bundled("llada-tiny"))
        DLLMQuantizer("dllmquant-w4a4").quantize(model).save_pretrained("out")

    Attributes:
        recipe: The resolved recipe.
        reports: After `quantize`: one `LayerReport` per packed layer, in execution order.
        states: After `quantize`: the calibration states, or None for data-free recipes.
        allocation: After `quantize`: the activation bits IA-AQ gave each site; empty if it was not asked.
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
        self.allocation: tuple[SiteBits, ...] = ()
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
        states: CalibrationStates | None = None,
        seed: int | None = None,
        save_dir: str | Path | None = None,
        file_prefix: str | None = None,
        progress: bool = True,
    ) -> PreTrainedModel:
        """Quantizes a model **in place** and returns it: no second copy is made.

        If anything fails before the first block is solved, the model is left as it was. Transforms that are folded into
        the weights would break that promise, so recipes that have them write the weights to a temporary file first.

        Args:
            model: The 16- or 32-bit model, or the path or hub id of one; None uses the one of `from_pretrained`.
            tokenizer: Its tokenizer; None loads the one saved with the model.
            prompts: Calibration prompts, or (prompt, completion) pairs, in your own domain; None uses built-in
                word problems, programs and stories.
            states: Calibration states made before by a quantizer with the same calibration settings, such as its
                `states`; None makes them. Token weights are computed anew. Closed-loop recipes use them in the
                first pass.
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
        if recipe.calibration is None and (prompts is not None or states is not None):
            raise ValueError(f"prompts, states: recipe {recipe.name!r} uses no calibration data; leave them None")
        job = _Job(target, adapter, plan, recipe, progress)
        if recipe.calibration is not None and (states is None or recipe.calibration.states == "closed_loop"):
            tokenizer = tokenizer or _saved_tokenizer(target)
            job.source = tokenizer, self._prompts(prompts, recipe)

        was_training = target.training
        target.eval()
        try:
            with _left_untouched_on_failure(target, recipe):
                job.run(states)
        finally:
            target.train(was_training)
        self.reports, self.states, self.allocation = job.reports, job.states, job.allocation
        _attach_config(job)
        if save_dir is not None:
            target.save_pretrained(save_dir)
            (tokenizer or _saved_tokenizer(target)).save_pretrained(save_dir)
        return target

    @staticmethod
    def _prompts(prompts: Sequence[Prompt] | None, recipe: Recipe) -> Sequence[Prompt]:
        """Returns the calibration prompts after checking them."""
        assert recipe.calibration is not None
        needed = prompts_needed(recipe.calibration)
        if prompts is None:
            logger.info("no calibration prompts given: using built-in word problems, programs and stories")
            prompts = builtin_prompts(needed, recipe.seed)
        check_prompts(prompts, needed)
        return prompts

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


@dataclass
class _Job:
    """One quantization: states, preparation and solving, twice for closed-loop states."""

    model: PreTrainedModel
    adapter: ModelAdapter
    plan: Plan
    recipe: Recipe
    progress: bool
    source: tuple[PreTrainedTokenizerBase, Sequence[Prompt]] | None = None
    reports: list[LayerReport] = field(default_factory=list)
    states: CalibrationStates | None = None
    allocation: tuple[SiteBits, ...] = ()

    def run(self, given: CalibrationStates | None) -> None:
        """Quantizes the model, with states made before if given."""
        settings = self.recipe.calibration
        closed_loop = settings is not None and settings.states == "closed_loop"
        if given is not None:
            self.states = given.reweighted(self.recipe.token_weights)
        elif settings is not None:
            self.states = self._collect("trajectory" if closed_loop else settings.states)
        preparation = prepare(self.model, self.adapter, self.plan, self.recipe, self.states, progress=self.progress)
        self.allocation = preparation.allocation
        originals = {name: self.model.get_submodule(name) for name in self.plan.modules}
        self._solve(preparation)
        if closed_loop:
            self.states = self._collect("closed_loop")
            for block in self.adapter.block_list(self.model):
                if installed(block) is not None:
                    uninstall(block)
            for name, module in originals.items():
                self.model.set_submodule(name, module)
            _, weights = block_token_weights(self.model, self.adapter, self.recipe, self.states)
            self._solve(replace(preparation, token_weights=tuple(weights)))

    def _collect(self, kind: str) -> CalibrationStates:
        """Makes calibration states with the model as it is now."""
        assert self.recipe.calibration is not None
        assert self.source is not None
        return collect_states(
            self.model,
            *self.source,
            self.recipe.calibration.model_copy(update={"states": kind}),
            self.recipe.token_weights,
            seed=self.recipe.seed,
            progress=self.progress,
        )

    def _solve(self, preparation: Preparation) -> None:
        calibration = self.recipe.calibration
        self.reports = quantize_blocks(
            self.model,
            self.adapter,
            self.plan,
            self.recipe,
            self.states,
            preparation,
            batch_size=1 if calibration is None else calibration.batch_size,
            progress=self.progress,
        )


@contextmanager
def _left_untouched_on_failure(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """Gives the parameters their values back if the context fails while no layer is packed.

    They wait on disk, not in memory, because a transform such as QuaRot touches all of them.
    """
    if not any(isinstance(transform, FoldedTransforms) for transform in recipe.transforms):
        yield
        return
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "parameters.safetensors"
        save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, file)
        try:
            yield
        except BaseException:
            if not any(isinstance(module, QuantLinear) for module in model.modules()):
                with safe_open(file, framework="pt") as saved, torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter.copy_(saved.get_tensor(name))
            raise


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


def _attach_config(job: _Job) -> None:
    """Makes the model a quantized transformers model: `save_pretrained` then writes all that a reload needs."""
    model, states = job.model, job.states
    modules = {name: model.get_submodule(name) for name in job.plan.modules}
    blocks = enumerate(job.adapter.block_list(model))
    attention = {f"{job.adapter.blocks}.{index}": installed(block) for index, block in blocks}
    config = DLLMQuantConfig(
        modules={name: describe_layer(layer) for name, layer in modules.items() if isinstance(layer, QuantLinear)},
        recipe=job.recipe.to_dict(),
        library_version=__version__,
        seed=job.recipe.seed,
        states_hash=None if states is None else states.content_hash(),
        attention={name: describe_attention(found) for name, found in attention.items() if found is not None},
        coverage=None if states is None or states.coverage is None else states.coverage.to_dict(),
        allocation=[asdict(entry) for entry in job.allocation],
    )
    model.config.quantization_config = config
    # transformers sets these two on models it loads quantized; its annotations know modules and tensors only.
    model.hf_quantizer = DLLMQuantHfQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.config.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
