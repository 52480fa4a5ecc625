"""IA-AQ's activation bits: what each site loses at each width, and the knapsack over all of them."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dllmquant.calibration import CalibrationStates
from dllmquant.capture import BlockCall, inputs_of
from dllmquant.core.allocate import allocate
from dllmquant.core.iaaq import SiteErrors
from dllmquant.models import ModelAdapter
from dllmquant.models.experts import is_expert
from dllmquant.models.inference import inference
from dllmquant.nn.activation import ActivationScheme, quantize_activation
from dllmquant.nn.transform import InputTransform
from dllmquant.plan import Plan
from dllmquant.settings import AllocationSettings
from dllmquant.transforms.fold import linear_at

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteBits:
    """The bits one site, or one head of it, was given.

    Attributes:
        site: Full path of the first layer that reads the input.
        unit: Index of the head, or None for the whole input.
        bits: Bits given.
        errors: The measured error at each candidate width.
    """

    site: str
    unit: int | None
    bits: int
    errors: dict[int, float]


@dataclass
class BitAllocation:
    """Measures what the sites lose and decides which of them get more bits.

    A site is the input of a group of layers; a unit is a site, or one head's share of it.

    Attributes:
        model: The model.
        adapter: Its adapter.
        plan: What is quantized.
        settings: The recipe's wishes.
        transforms: The input transforms, by the full path of the first layer of a group; may still grow.
        errors: What each unit loses at each width; filled by the measurements.
        sizes: Values per token of each unit.
    """

    model: PreTrainedModel
    adapter: ModelAdapter
    plan: Plan
    settings: AllocationSettings
    transforms: dict[str, InputTransform]
    errors: dict[tuple[str, int | None], dict[int, float]] = field(default_factory=dict)
    sizes: dict[tuple[str, int | None], int] = field(default_factory=dict)

    def _units(self, group: Sequence[str]) -> list[int | None]:
        """Lists the units of a group's input: the heads of the attention output if asked for, else the whole."""
        if not self.settings.heads:
            return [None]
        assert self.adapter.value_output is not None
        assert self.adapter.heads is not None
        if not group[0].endswith("." + self.adapter.value_output[1]):
            return [None]
        return list(range(getattr(self.model.config, self.adapter.heads[0])))

    def _candidates(self) -> tuple[int, int]:
        assert self.plan.activation is not None
        return self.plan.activation.bits, self.settings.high_bits

    def _scheme(self, group: Sequence[str], bits: Sequence[int]) -> ActivationScheme:
        """Returns a group's scheme with the given bits, one per unit."""
        assert self.plan.activation is not None
        if len(bits) == 1:
            return replace(self.plan.activation, bits=bits[0])
        width = linear_at(self.model, group[0]).in_features // len(bits)
        size = self.plan.activation.group_size or width
        per_group = tuple(b for b in bits for _ in range(width // size))
        return replace(self.plan.activation, bits=max(bits), group_size=size, group_bits=per_group)

    def _trials(self, group: Sequence[str]) -> Iterator[tuple[tuple[str, int | None], int, ActivationScheme]]:
        """Yields (unit, bits, scheme) for every candidate; a unit is tried with the others at high bits."""
        units = self._units(group)
        low, high = self._candidates()
        for unit in units:
            self.sizes[group[0], unit] = linear_at(self.model, group[0]).in_features // len(units)
            for bits in (low, high):
                scheme = self._scheme(group, [bits if other == unit else high for other in units])
                yield (group[0], unit), bits, scheme

    def measure_output(
        self, block: nn.Module, group: Sequence[str], calls: Sequence[BlockCall], weights: Sequence[Tensor]
    ) -> None:
        """Measures the interaction-weighted error of the outputs of the layers that read a quantized input."""
        linears = [linear_at(self.model, name) for name in group]
        transform = self.transforms.get(group[0])
        matrix = torch.cat([linear.weight.detach().float() for linear in linears])
        if transform is not None:
            matrix = transform.inverse_transpose_weight(matrix).to(matrix)
        trials = list(self._trials(group))
        quantizers = [functools.partial(quantize_activation, scheme=scheme) for _, _, scheme in trials]
        errors, count = SiteErrors(matrix, quantizers), 0
        for call, w in zip(calls, weights, strict=True):
            seen = inputs_of(block, linears[:1], call, w)
            x = seen.tokens[0].float()
            count += int((seen.weights[0] > 0).sum())
            errors.add(x if transform is None else transform(x), seen.weights[0])
        starved = count == 0 and is_expert(block, linears[0])  # an expert nothing speaks for has low bits
        found = [0.0] * len(trials) if starved else errors.relative().tolist()
        for (unit, bits, _), error in zip(trials, found, strict=True):
            self.errors.setdefault(unit, {})[bits] = error

    def measure_logits(self, states: CalibrationStates, batch_size: int, *, progress: bool) -> None:
        """Measures, site by site, the KL divergence of the predictions at masked positions when it is quantized."""
        trials = [(group, *trial) for group in self.plan.groups for trial in self._trials(group)]
        totals = [0.0] * len(trials)
        starts = range(0, len(states.batch), batch_size)
        denoise, blocks = self.adapter.denoiser(self.model), self.adapter.block_list(self.model)
        with inference(self.model, blocks):
            for start in tqdm(starts, desc="measuring sites", unit="batch", disable=not progress):
                rows = slice(start, start + batch_size)
                ids = states.batch.ids[rows].to(self.model.device)
                keep = states.batch.attention_mask[rows].to(self.model.device)
                masked = states.batch.mask[rows].to(self.model.device)
                weights = states.weights[rows].to(self.model.device)[masked]
                reference = denoise(ids, keep)[masked].float().log_softmax(-1)
                for index, (group, _, _, scheme) in enumerate(trials):
                    with _quantized_inputs(self.model, group, scheme, self.transforms.get(group[0])):
                        got = denoise(ids, keep)[masked].float().log_softmax(-1)
                    divergence = (reference.exp() * (reference - got)).sum(-1)
                    totals[index] += float((divergence * weights).sum())
        for (_, unit, bits, _), total in zip(trials, totals, strict=True):
            self.errors.setdefault(unit, {})[bits] = total

    def allocated(self) -> tuple[dict[str, ActivationScheme | None], tuple[SiteBits, ...]]:
        """Solves the knapsack and returns every group's scheme."""
        low, high = self._candidates()
        units = list(self.errors)
        costs = torch.tensor([[self.errors[unit][low], self.errors[unit][high]] for unit in units], dtype=torch.float64)
        sizes = [self.sizes[unit] for unit in units]
        chosen = dict(zip(units, allocate(costs, sizes, (low, high), self.settings.mean_bits), strict=True))
        schemes: dict[str, ActivationScheme | None] = {}
        for group in self.plan.groups:
            schemes[group[0]] = self._scheme(group, [chosen[group[0], unit] for unit in self._units(group)])
        table = tuple(SiteBits(site, unit, chosen[site, unit], self.errors[site, unit]) for site, unit in units)
        raised = sum(entry.bits == high for entry in table)
        logger.info("activation bits: %d of %d units at %d bits", raised, len(table), high)
        return schemes, table


@contextmanager
def _quantized_inputs(
    model: nn.Module, group: Sequence[str], scheme: ActivationScheme, transform: InputTransform | None
) -> Iterator[None]:
    """While the context lasts, the layers of a group compute with quantized inputs and their own weights."""

    def output_of(linear: nn.Linear) -> Callable[..., Tensor]:
        weight = linear.weight if transform is None else transform.inverse_transpose_weight(linear.weight)

        def recompute(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
            x = args[0] if transform is None else transform(args[0])
            return F.linear(quantize_activation(x, scheme), weight.to(x.dtype), linear.bias)

        return recompute

    with ExitStack() as stack:
        for name in group:
            linear = linear_at(model, name)
            stack.callback(linear.register_forward_hook(output_of(linear)).remove)
        yield
