"""One quantization from beginning to end: states, counts, preparation, solving."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.attention_fit import AttentionReport
from dllmquant.calibration import CalibrationStates, Cost, Prompt, collect_states
from dllmquant.calibration.experts import ExpertTokens, experts_summary, starved, tokens_per_expert
from dllmquant.models import ModelAdapter
from dllmquant.models.experts import mixtures
from dllmquant.nn.attention import installed, uninstall
from dllmquant.nn.linear import QuantLinear
from dllmquant.pipeline import LayerReport, quantize_blocks
from dllmquant.plan import Plan
from dllmquant.preparation import Preparation, SiteBits, prepare
from dllmquant.recipe import Recipe
from dllmquant.settings import CalibrationSettings, FoldedTransforms

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """One quantization: states, preparation and solving; all of it twice for closed-loop states.

    Attributes:
        model: The model, quantized in place.
        adapter: Its adapter.
        plan: What is quantized.
        recipe: The recipe.
        progress: Whether to show progress bars.
        source: Tokenizer and prompts; None where no states are made.
        reports: After `run`: one per packed layer, in execution order.
        attention_reports: After `run`: one per block whose attention was fitted, in execution order.
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
    attention_reports: list[AttentionReport] = field(default_factory=list)
    states: CalibrationStates | None = None
    allocation: tuple[SiteBits, ...] = ()
    expert_tokens: ExpertTokens = field(default_factory=dict)

    def run(self, given: CalibrationStates | None) -> None:
        """Quantizes the model, with states made before if given.

        A failure before the first block is solved, in either pass, leaves the model as it was.
        """
        settings = self.recipe.calibration
        closed_loop = settings is not None and settings.states == "closed_loop"
        if given is not None:
            self.states = given.reweighted(self.recipe.token_weights)
            if settings is not None:
                self.expert_tokens = tokens_per_expert(self.model, self.adapter, self.states, settings.batch_size)
        elif settings is not None:
            self.states = self._collect("trajectory" if closed_loop else settings.states, settings.num_states)
        self._tell_of_experts()
        originals = {name: self.model.get_submodule(name) for name in self.plan.modules if closed_loop}
        with left_untouched_on_failure(self.model, self.recipe) as restore:
            self._quantize()
            if closed_loop:
                assert self.states is not None
                try:
                    self.states = self._collect("closed_loop", len(self.states.batch))
                finally:
                    self._unpack(originals)
                restore()
                self._quantize()

    def _collect(self, kind: str, num_states: int) -> CalibrationStates:
        """Makes calibration states with the model as it is now, more than asked for if experts would starve."""
        settings = self.recipe.calibration
        assert settings is not None
        assert self.source is not None
        costs: list[Cost] = []
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
                costs += [] if states.cost is None else [states.cost]
                grown = min(2 * num_states, settings.max_growth * settings.num_states, self._available(states, kind))
                self.expert_tokens = tokens_per_expert(self.model, self.adapter, states, settings.batch_size)
                hungry = starved(self.expert_tokens, settings.min_expert_tokens)
                if not hungry or grown <= num_states:
                    return replace(states, cost=self._total(costs, kind))
                logger.info(
                    "%d experts read fewer than %d tokens: %d states instead of %d",
                    hungry,
                    settings.min_expert_tokens,
                    grown,
                    num_states,
                )
                num_states = grown

    def _total(self, costs: Sequence[Cost], kind: str) -> Cost | None:
        """Returns what states cost: the last draw, in the time of all; and the first pass of a closed loop.

        Draws of one call share a recording, which is new if it was when the first one made it.
        """
        if not costs:
            return None
        total = replace(costs[-1], seconds=sum(cost.seconds or 0.0 for cost in costs), cached=costs[0].cached)
        first = self.states.cost if kind == "closed_loop" and self.states is not None else None
        return total if first is None else first + total

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

    def _quantize(self) -> None:
        """Prepares and solves the model as it is now, for the states there are now."""
        preparation = prepare(self.model, self.adapter, self.plan, self.recipe, self.states, progress=self.progress)
        self.allocation = preparation.allocation
        self._solve(preparation)

    def _unpack(self, originals: Mapping[str, nn.Module]) -> None:
        """Undoes the swaps of a pass: layers and attention are again those of 16 bits."""
        for block in self.adapter.block_list(self.model):
            if installed(block) is not None:
                uninstall(block)
        for name, module in originals.items():
            self.model.set_submodule(name, module)

    def _solve(self, preparation: Preparation) -> None:
        calibration = self.recipe.calibration
        self.reports, self.attention_reports = quantize_blocks(
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
def left_untouched_on_failure(model: PreTrainedModel, recipe: Recipe) -> Iterator[Callable[[], None]]:
    """Gives the parameters their values back if the context fails while no layer is packed.

    They wait on disk, not in memory, because a transform such as QuaRot touches all of them. Recipes without folded
    transforms change none.

    Yields:
        What gives them their values back at any other time when no layer is packed.
    """
    if not any(isinstance(transform, FoldedTransforms) for transform in recipe.transforms):
        yield lambda: None
        return
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "parameters.safetensors"
        save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, file)

        def restore() -> None:
            with safe_open(file, framework="pt") as saved, torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(saved.get_tensor(name))

        try:
            yield restore
        except BaseException:
            if not any(isinstance(module, QuantLinear) for module in model.modules()):
                restore()
            raise
