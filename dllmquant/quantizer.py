"""`DLLMQuantizer`: a recipe applied to a model, in the shape Optimum gives quantizers."""

import inspect
import logging
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from optimum.quantization_base import OptimumQuantizer
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dllmquant._version import __version__
from dllmquant.attention_fit import AttentionReport
from dllmquant.calibration import (
    CalibrationStates,
    GivenPrompts,
    Prompt,
    builtin_prompts,
    check_prompts,
    prompts_needed,
)
from dllmquant.calibration.experts import ExpertTokens
from dllmquant.integrations.saving import extend_saving
from dllmquant.integrations.transformers import (
    DLLMQuantConfig,
    DLLMQuantHfQuantizer,
    describe_attention,
    describe_layer,
)
from dllmquant.job import Job
from dllmquant.models import ModelAdapter, adapter_for
from dllmquant.models.experts import mixtures
from dllmquant.nn.attention import installed
from dllmquant.nn.linear import QuantLinear
from dllmquant.pipeline import LayerReport
from dllmquant.plan import Plan, make_plan
from dllmquant.preparation import SiteBits
from dllmquant.recipe import Recipe

logger = logging.getLogger(__name__)

# Options of `from_pretrained` that say where files come from, and those of them that are about one repository.
_HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")
_REPOSITORY_OPTIONS = ("revision", "code_revision", "subfolder", "trust_remote_code")


class DLLMQuantizer(OptimumQuantizer):  # type: ignore[misc]
    """Quantizes diffusion LLMs by a recipe.

        model = AutoModel.from_pretrained(dllmquant.bundled("llada-tiny"))
        DLLMQuantizer("dllmquant-w4a4").quantize(model).save_pretrained("out")

    or, with the calls that Optimum's quantizers have:

        DLLMQuantizer.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", recipe="dllmquant-w4a4").quantize("out")

    Attributes:
        recipe: The resolved recipe.
        reports: After `quantize`: one `LayerReport` per packed layer, in execution order.
        attention_reports: After `quantize`: one `AttentionReport` per block whose attention was fitted to states.
        states: After `quantize`: the calibration states, or None for data-free recipes.
        expert_tokens: After `quantize`: how many calibration tokens each expert of a mixture model read.
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
        self.attention_reports: list[AttentionReport] = []
        self.expert_tokens: ExpertTokens = {}
        self.states: CalibrationStates | None = None
        self.allocation: tuple[SiteBits, ...] = ()
        self._model: PreTrainedModel | str | None = None
        self._load_options: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: PreTrainedModel | str | Path,
        file_name: str | None = None,
        *,
        recipe: Recipe | str | Path | dict[str, Any] = "dllmquant-w4a4",
        **load_options: Any,
    ) -> Self:
        """Binds a quantizer to a model, as Optimum's quantizers do; `quantize(save_dir)` then needs no model.

        Args:
            model_or_path: A model, or the path or hub id of one, which `quantize` loads.
            file_name: Must be None; part of Optimum's signature.
            recipe: As for `DLLMQuantizer`.
            **load_options: As for `AutoModel.from_pretrained`, such as `dtype` or `device_map`; for a path or hub id.
                Those that say where files come from, such as `revision`, `token`, `cache_dir` and `trust_remote_code`,
                count for the tokenizer too.

        Raises:
            RecipeError: The recipe is not valid.
            ValueError: `file_name` was given, or `load_options` with a model that is loaded already.
        """
        if file_name is not None:
            raise ValueError(f"file_name={file_name!r}: dllmquant reads whole checkpoint directories; leave it None")
        quantizer = cls(recipe)
        if not isinstance(model_or_path, PreTrainedModel):
            quantizer._model, quantizer._load_options = str(model_or_path), load_options
        elif load_options:
            raise ValueError(
                f"{', '.join(load_options)}: has no effect on a model that is loaded already; leave it out"
            )
        else:
            quantizer._model = model_or_path
        return quantizer

    def quantize(
        self,
        model_or_save_dir: PreTrainedModel | str | Path | None = None,
        /,
        file_prefix: str | None = None,
        *,
        model: PreTrainedModel | str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        prompts: "GivenPrompts | None" = None,
        states: CalibrationStates | None = None,
        seed: int | None = None,
        save_dir: str | Path | None = None,
        progress: bool = True,
        **unknown: Any,
    ) -> PreTrainedModel:
        """Quantizes a model **in place** and returns it: no second copy is made.

        The first argument is the model; or the directory to save to, as Optimum calls quantizers, if `from_pretrained`
        bound this quantizer to a model. `model=` and `save_dir=` say the same by name.

        If anything fails before the first block is solved, the model is left as it was. Transforms that are folded into
        the weights would break that promise, so recipes that have them write the weights to a temporary file first;
        the second pass of closed-loop recipes starts from it too. A failure between the passes also leaves the model as
        it was.

        Args:
            model_or_save_dir: `model`, or `save_dir` of a quantizer that is bound to a model.
            file_prefix: Must be None; part of Optimum's signature. Checkpoint files are named as transformers names
                them, so that it finds them.
            model: The 16- or 32-bit model, or the path or hub id of one; None if `from_pretrained` was given it.
            tokenizer: Its tokenizer, or the path or hub id of one; None loads the one saved with the model. A model
                without one is an error only if the recipe reads prompts.
            prompts: Calibration prompts in your own domain: a list of texts, (prompt, completion) pairs or mappings
                with the fields "prompt" and, if any, "completion" (or one field alone), as prompt files have them; or
                a `datasets.Dataset` of such rows. The first ones are used; `load_prompts` draws at random, and reads
                other fields. None uses built-in word problems, programs and stories.
            states: Calibration states made before by a quantizer with the same calibration settings, such as its
                `states`; None makes them. Token weights are computed anew. Closed-loop recipes use them in the
                first pass.
            seed: Replaces the recipe's seed.
            save_dir: Where to save model and tokenizer; None saves nothing.
            progress: Whether to show progress bars.
            **unknown: Must be empty: an argument of another name is an error that lists the valid ones.

        Returns:
            The same model object, its linear layers packed; `save_pretrained` writes a checkpoint that
            `AutoModel.from_pretrained` reads back bit-identically.

        Raises:
            RecipeError: The recipe does not fit the model.
            ValueError: An argument is unknown; model or directory are given twice, or no model is; the model is not a
                known diffusion LLM, is quantized already or holds NaN; there are too few prompts, or one is not as
                above (the message names its index); or a solver failed.
        """
        if unknown:
            known = [name for name in inspect.signature(self.quantize).parameters if name != "unknown"]
            raise ValueError(f"quantize: unknown arguments {', '.join(unknown)}; valid: {', '.join(known[1:])}")
        if file_prefix is not None:
            raise ValueError(
                f"file_prefix={file_prefix!r}: checkpoint files are named as transformers names them "
                "(model.safetensors); valid: None"
            )
        source, save_dir = self._source_and_directory(model_or_save_dir, model, save_dir)
        target = self._loaded(source)
        adapter, plan = self._checked(target)
        recipe = self.recipe if seed is None else Recipe.load(self.recipe.to_dict() | {"seed": seed})
        if recipe.calibration is None and (prompts is not None or states is not None):
            raise ValueError(f"prompts, states: recipe {recipe.name!r} uses no calibration data; leave them None")
        job = Job(target, adapter, plan, recipe, progress)
        needs_prompts = recipe.calibration is not None and (
            states is None or recipe.calibration.states == "closed_loop"
        )
        if needs_prompts or (save_dir is not None and tokenizer is not None):
            tokenizer = self._tokenizer(tokenizer, target)
            if needs_prompts:
                job.source = tokenizer, self._prompts(prompts, recipe, target)

        was_training = target.training
        target.eval()
        try:
            job.run(states)
        finally:
            target.train(was_training)
        self.reports, self.states, self.allocation = job.reports, job.states, job.allocation
        self.attention_reports, self.expert_tokens = job.attention_reports, job.expert_tokens
        _attach_config(job)
        if save_dir is not None:
            self.save(target, save_dir, tokenizer=tokenizer)
        return target

    def quantize_model(
        self,
        model: PreTrainedModel | str | Path,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """Does what `quantize(model, tokenizer=tokenizer, **options)` does; Optimum's GPTQ quantizer calls it so."""
        return self.quantize(model=model, tokenizer=tokenizer, **options)

    def save(
        self,
        model: PreTrainedModel,
        save_dir: str | Path,
        max_shard_size: int | str = "50GB",
        safe_serialization: bool = True,
        *,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        **options: Any,
    ) -> None:
        """Saves a model that this or another quantizer packed, with its tokenizer and a model card.

        Args:
            model: The quantized model.
            save_dir: Directory of the checkpoint.
            max_shard_size: Largest size of a weight file.
            safe_serialization: Must be True; part of the signature of Optimum's GPTQ quantizer.
            tokenizer: The tokenizer; None takes the one saved with the model, and leaves it out if there is none.
            **options: As for the model's `save_pretrained`, such as `evaluation`: results for the model card.

        Raises:
            ValueError: The model is not quantized, `safe_serialization` is False, or a tokenizer that was named cannot
                be loaded.
            OSError: The directory is a file or cannot be written.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False: only safetensors are written; valid: True")
        if not isinstance(getattr(model.config, "quantization_config", None), DLLMQuantConfig):
            raise ValueError("model: it is not quantized by dllmquant; valid: a model that quantize returned")
        found = None
        try:
            found = self._tokenizer(tokenizer, model)
        except ValueError as error:
            if tokenizer is not None:
                raise
            logger.warning("%s gets no tokenizer: %s", save_dir, error)
        model.save_pretrained(save_dir, max_shard_size=max_shard_size, **options)
        if found is not None:
            found.save_pretrained(save_dir)

    def to_dict(self) -> dict[str, Any]:
        """Returns what makes a quantizer, as JSON-compatible values; `from_dict` restores it."""
        return {"recipe": self.recipe.to_dict()}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Self:
        """Makes a quantizer of what `to_dict` returned.

        Raises:
            RecipeError: The recipe is not valid.
            ValueError: The keys are not those of `to_dict`.
        """
        if set(document) != {"recipe"}:
            raise ValueError(f"quantizer: keys {sorted(document)}; valid: recipe")
        return cls(document["recipe"])

    def _source_and_directory(
        self,
        first: PreTrainedModel | str | Path | None,
        model: PreTrainedModel | str | Path | None,
        save_dir: str | Path | None,
    ) -> tuple[PreTrainedModel | str | Path, str | Path | None]:
        """Returns the model and where to save it, by the rule of `quantize`."""
        if self._model is None:
            if first is not None and model is not None:
                raise ValueError("model: given twice, as the first argument and by name; give one")
            source = first if model is None else model
            if source is None:
                raise ValueError("model: none given; pass one, or bind one with DLLMQuantizer.from_pretrained")
            return source, save_dir
        if model is not None or isinstance(first, PreTrainedModel):
            raise ValueError(
                "model: this quantizer is bound to one by from_pretrained; leave it out, or pass it to a quantizer "
                "made by DLLMQuantizer(recipe)"
            )
        if first is not None and save_dir is not None:
            raise ValueError(f"save_dir: given twice, as {str(first)!r} and as {str(save_dir)!r}; give one")
        return self._model, save_dir if first is None else first

    @staticmethod
    def _prompts(prompts: "GivenPrompts | None", recipe: Recipe, model: PreTrainedModel) -> list[Prompt]:
        """Returns the calibration prompts after checking them."""
        assert recipe.calibration is not None
        needed = prompts_needed(recipe.calibration)
        if prompts is None:
            logger.info("no calibration prompts given: using built-in word problems, programs and stories")
            growth = recipe.calibration.max_growth if mixtures(model) else 1
            prompts = builtin_prompts(needed * growth, recipe.seed)
        return check_prompts(prompts, needed)

    def _tokenizer(
        self, given: PreTrainedTokenizerBase | str | Path | None, model: PreTrainedModel
    ) -> PreTrainedTokenizerBase:
        """Returns the given tokenizer, loaded if it is a path or hub id, or else the one saved with the model."""
        if given is not None and not isinstance(given, str | Path):
            return given
        path = model.config._name_or_path if given is None else str(given)
        if not path:
            raise ValueError("tokenizer: the model was not loaded from a checkpoint; pass tokenizer=")
        names = _HUB_OPTIONS + (_REPOSITORY_OPTIONS if path == self._model else ())
        options = {name: self._load_options[name] for name in names if name in self._load_options}
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer: none can be loaded from {path!r}; pass tokenizer= ({error})") from error
        return tokenizer

    def _loaded(self, source: PreTrainedModel | str | Path) -> PreTrainedModel:
        if isinstance(source, PreTrainedModel):
            return source
        loaded: PreTrainedModel = AutoModel.from_pretrained(str(source), **self._load_options)
        return loaded

    def _checked(self, model: PreTrainedModel) -> tuple[ModelAdapter, Plan]:
        """Checks that this recipe can be applied to this model."""
        if getattr(model.config, "quantization_config", None) is not None or any(
            isinstance(module, QuantLinear) for module in model.modules()
        ):
            raise ValueError("model: it is quantized already; load the 16-bit original")
        adapter = adapter_for(model)
        if adapter.arrange is not None:
            adapter.arrange(model)
        return adapter, make_plan(model, adapter, self.recipe)


def _hub_id(model: PreTrainedModel) -> str | None:
    """Returns the hub id a model was loaded from; None if it came from elsewhere."""
    path: str = model.config._name_or_path
    return path if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).exists() else None


def _attach_config(job: Job) -> None:
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
        cost=None if states is None or states.cost is None else states.cost.counts(),
        attention_reports=[asdict(report) for report in job.attention_reports],
        allocation=[asdict(entry) for entry in job.allocation],
        expert_tokens=job.expert_tokens,
        base_model=_hub_id(model),
    )
    model.config.quantization_config = config
    # transformers sets these two on models it loads quantized; its annotations know modules and tensors only.
    model.hf_quantizer = DLLMQuantHfQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.config.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    extend_saving(model)
