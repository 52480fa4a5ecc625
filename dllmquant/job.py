"""One quantization from beginning to end: states, counts, preparation, solving."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.calibration import CalibrationStates, Prompt, collect_states
from dllmquant.calibration.experts import ExpertTokens, experts_summary, starved, tokens_per_expert
from dllmquant.models import ModelAdapter
from dllmquant.models.experts import mixtures
from dllmquant.nn.attention import installed, uninstall
from dllmquant.nn.linear import QuantLinear
from dllmquant.pipeline import LayerReport, quantize_blocks
from dllmquant.plan import Plan
from dllmquant.preparation import Preparation, SiteBits, block_token_weights, prepare
from dllmquant.recipe import Recipe
from dllmquant.settings import CalibrationSettings, FoldedTransforms

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """One quantization: states, preparation and solving, twice for closed-loop states.

    Attributes:
        model: The model, quantized in place.
        adapter: Its adapter.
        plan: What is quantized.
        recipe: The recipe.
        progress: Whether to show progress bars.
        source: Tokenizer and prompts; None where no states are made.
        reports: After `run`: one per packed layer, in execution order.
        states: After `run`: the calibration states the layers were solved for.
        allocation: After `run`: what IA-AQ decided.
        expert_tokens: After `run`: the calibration tokens of every expert, by the router of the model the states were
            made with.
    """

    model: PreTrainedModel
    adapter: ModelAdapter
    plan: Plan
    recipe: Recipe
    progress: bool
    source: tuple[PreTrainedTokenizerBase, Sequence[Prompt]] | None = None
    reports: list[LayerReport] = field(default_factory=list)
    states: CalibrationStates | None = None
    allocation: tuple[SiteBits, ...] = ()
    expert_tokens: ExpertTokens = field(default_factory=dict)

    def run(self, given: CalibrationStates | None) -> None:
        """Quantizes the model, with states made before if given."""
        settings = self.recipe.calibration
        closed_loop = settings is not None and settings.states == "closed_loop"
        if given is not None:
            self.states = given.reweighted(self.recipe.token_weights)
            if settings is not None:
                self.expert_tokens = tokens_per_expert(self.model, self.adapter, self.states, settings.batch_size)
        elif settings is not None:
            self.states = self._collect("trajectory" if closed_loop else settings.states, settings.num_states)
        self._tell_of_experts()
        preparation = prepare(self.model, self.adapter, self.plan, self.recipe, self.states, progress=self.progress)
        self.allocation = preparation.allocation
        originals = {name: self.model.get_submodule(name) for name in self.plan.modules}
        self._solve(preparation)
        if closed_loop:
            assert self.states is not None
            self.states = self._collect("closed_loop", len(self.states.batch))
            for block in self.adapter.block_list(self.model):
                if installed(block) is not None:
                    uninstall(block)
            for name, module in originals.items():
                self.model.set_submodule(name, module)
            _, weights = block_token_weights(self.model, self.adapter, self.recipe, self.states)
            self._solve(replace(preparation, token_weights=tuple(weights)))

    def _collect(self, kind: str, num_states: int) -> CalibrationStates:
        """Makes calibration states with the model as it is now, more than asked for if experts would starve."""
        settings = self.recipe.calibration
        assert settings is not None
        assert self.source is not None
        with self._trajectories_kept(settings) as settings:
            while True:
                states = collect_states(
                    self.model,
                    *self.source,
                    settings.model_copy(update={"states": kind, "num_states": num_states}),
                    self.recipe.token_weights,
                    seed=self.recipe.seed,
                    progress=self.progress,
                )
                grown = min(2 * num_states, settings.max_growth * settings.num_states, self._available(states, kind))
                self.expert_tokens = tokens_per_expert(self.model, self.adapter, states, settings.batch_size)
                hungry = starved(self.expert_tokens, settings.min_expert_tokens)
                if not hungry or grown <= num_states:
                    return states
                logger.info(
                    "%d experts read fewer than %d tokens: %d states instead of %d",
                    hungry,
                    settings.min_expert_tokens,
                    grown,
                    num_states,
                )
                num_states = grown

    @contextmanager
    def _trajectories_kept(self, settings: CalibrationSettings) -> Iterator[CalibrationSettings]:
        """While the context lasts, the trajectories of a mixture model are cached: states may be drawn again."""
        if settings.cache is not None or not mixtures(self.model):
            yield settings
            return
        with tempfile.TemporaryDirectory() as directory:
            yield settings.model_copy(update={"cache": directory})

    def _available(self, states: CalibrationStates, kind: str) -> int:
        """Returns how many states there are to choose from."""
        assert self.source is not None
        if states.coverage is not None and states.coverage.recorded is not None:
            return sum(map(sum, states.coverage.recorded))
        return len(self.source[1])

    def _tell_of_experts(self) -> None:
        """Says how many tokens the experts read, and whether any of them starves."""
        settings = self.recipe.calibration
        if self.expert_tokens and settings is not None:
            hungry = starved(self.expert_tokens, settings.min_expert_tokens)
            logger.log(
                logging.WARNING if hungry else logging.INFO,
                "%s%s",
                experts_summary(self.expert_tokens, settings.min_expert_tokens),
                "; calibration.num_prompts or calibration.max_growth may help" if hungry else "",
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
        rounded = sum(report.fallback is not None for report in self.reports)
        if rounded:
            logger.warning("%d layers of starved experts were rounded to nearest; their reports say why", rounded)


@contextmanager
def left_untouched_on_failure(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
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
