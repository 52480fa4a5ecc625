"""Running an ablation, run by run."""

import copy
import dataclasses
import gc
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dllmquant._version import __version__
from dllmquant.checkpoint import weight_bytes
from dllmquant.lab.ablation.document import Ablation, generates
from dllmquant.lab.ablation.plan import AblationPlan, ModelSource, PlannedRun
from dllmquant.lab.ablation.report import accuracy_table, draw, failure, write_tables
from dllmquant.lab.ablation.result import RunResult, find_result, last_line
from dllmquant.lab.ablation.summary import Summary, summarize
from dllmquant.lab.agreement import (
    AgreementReference,
    measure_agreement,
    record_agreement,
)
from dllmquant.lab.evaluate import evaluate, peak_memory
from dllmquant.lab.tables import aligned
from dllmquant.models import adapter_for
from dllmquant.quantizer import DLLMQuantizer
from dllmquant.recipe import Recipe
from dllmquant.tasks import take
from dllmquant.transforms.outliers import plant_outliers

logger = logging.getLogger(__name__)

# A model whose weights take less is kept and copied for every cell; a larger one is loaded anew, never held twice.
_COPY_BYTES = 2**30


class _Original:
    """A model of the ablation: fresh instances of it, and what the original did with the agreement prompts."""

    def __init__(self, source: ModelSource, ablation: Ablation, device: str) -> None:
        self.source, self.device, self._ablation = source, device, ablation
        self._kept: PreTrainedModel | None = None
        self._is_large = False
        self._reference: AgreementReference | None = None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.source.directory)
        return tokenizer

    def fresh(self) -> PreTrainedModel:
        """An instance that may be changed: a copy of a small model, or else one that is loaded again."""
        if self._kept is not None:
            return copy.deepcopy(self._kept)
        model: PreTrainedModel = AutoModel.from_pretrained(self.source.directory, device_map=self.device).eval()
        if self.source.stress is not None:
            plant_outliers(model, adapter_for(model), **self.source.stress.model_dump())
        self._is_large = weight_bytes(model).total_bytes > _COPY_BYTES
        if self._is_large:
            return model
        self._kept = model
        return copy.deepcopy(model)

    def reference(self, tokenizer: PreTrainedTokenizerBase) -> AgreementReference:
        if self._reference is None:
            self._reference = record_agreement(
                self.fresh(),
                tokenizer,
                _agreement_prompts(self._ablation),
                batch_size=self._ablation.batch_size,
                **self._ablation.sampler,
            )
            self.release()
        return self._reference

    def release(self) -> None:
        """Frees instances that nobody holds, cycles included, before the next large one is loaded."""
        if self._is_large:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@dataclass(frozen=True, eq=False)
class AblationResult:
    """What an ablation found and wrote.

    Attributes:
        text: The report for a terminal.
        summary: The numbers.
        failed: Titles of the runs that failed.
        files: results.json, results.csv, results.md and results.png.
    """

    text: str
    summary: "Summary"
    failed: tuple[str, ...]
    files: tuple[Path, ...]


def run_ablation(
    plan: AblationPlan,
    output: Path,
    *,
    device: str = "cpu",
    progress: bool = False,
    report: Callable[[str], object] = logger.info,
) -> AblationResult:
    """Measures what is not measured yet and writes the tables, anew after every run.

    A run that fails is recorded with its traceback, shown in the tables, and tried again next time; the others go on.

    Args:
        plan: From `plan_ablation`.
        output: Directory for cells/, trajectories/ (recorded for calibration, shared between cells) and results.json,
            .csv, .md and .png.
        device: Where to run.
        progress: Whether to show a progress bar.
        report: Told, in a line each, which runs are finished.

    Raises:
        ValueError: A result in the directory cannot be read.
    """
    found = {run: find_result(run, output) for run in plan.runs}
    results = {run: result for run, result in found.items() if result is not None and result.error is None}
    missing = [run for run in plan.runs if run not in results]
    report(f"{plan.ablation.name}: {len(plan.runs)} runs, {len(results)} of them done before")
    for run in results:
        report(f"finished before: {run.title}")
    sources = {source.name: source for source in plan.models}
    original: _Original | None = None
    with tqdm(total=len(plan.runs), initial=len(results), unit="run", disable=not progress) as bar:
        for index, run in enumerate(missing):
            bar.set_description(run.title)
            if original is not None:
                original.release()
            if original is None or run.model != missing[index - 1].model:
                original = _Original(sources[run.model], plan.ablation, device)
            result = _measure(run, original, plan.ablation, trajectories=output / "trajectories")
            result.save(output / "cells" / run.file_name)
            results[run] = result
            report(_finished(run, result))
            write_tables(plan, summarize(plan, results), output)
            bar.update()
    summary = summarize(plan, results)
    header, rows = accuracy_table(plan.ablation, summary)
    files = (*write_tables(plan, summary, output), draw(plan, summary, output / "results.png"))
    failed = tuple(run.title for run, result in results.items() if result.error is not None)
    lines = [aligned(header, rows, left=3), *(failure(row) for row in summary.rows if row.errors)]
    text = "\n\n".join(["\n".join(lines), "\n".join(f"wrote {path}" for path in files)])
    return AblationResult(text, summary, failed, files)


def _measure(run: PlannedRun, original: _Original, ablation: Ablation, *, trajectories: Path) -> RunResult:
    """One run, from a fresh model to its numbers."""
    source, device = original.source, original.device
    result = RunResult(
        model=run.model,
        cell=run.cell,
        seed=run.seed,
        key=run.key,
        recipe=None if run.recipe is None else run.recipe.to_dict(),
        metadata={"dllmquant": __version__, "model_digest": source.digest, "device": device},
    )
    _reset_peak_memory()
    try:
        tokenizer = original.tokenizer()
        reference = original.reference(tokenizer)
        model = original.fresh()
        times = [time.perf_counter()]
        if run.recipe is not None:
            recipe = _sharing_trajectories(run.recipe, trajectories)
            DLLMQuantizer(recipe).quantize(model, tokenizer=tokenizer, progress=False)
        times.append(time.perf_counter())
        evaluation = evaluate(
            model,
            tokenizer,
            ablation.tasks,
            limit=ablation.limit,
            batch_size=ablation.batch_size,
            mc_num=ablation.mc_num,
            progress=False,
            **ablation.sampler,
        )
        times.append(time.perf_counter())
        agreement = measure_agreement(reference, model, tokenizer, batch_size=ablation.batch_size)
        times.append(time.perf_counter())
        size = weight_bytes(model)
        names = ("quantization", "evaluation", "agreement")
        return dataclasses.replace(
            result,
            items=evaluation.items,
            scores=evaluation.scores,
            agreement=agreement,
            bytes_per_weight=_linear_bytes(model) if run.recipe is None else size.bytes_per_quantized_weight,
            total_bytes=size.total_bytes,
            seconds={name: times[index + 1] - times[index] for index, name in enumerate(names)},
            metadata=result.metadata
            | evaluation.metadata
            | {"sampler": evaluation.sampler, "peak_memory_bytes": _peak_memory(device)},
        )
    except Exception as error:  # whatever it is, it is this run's result, and the others go on
        logger.debug("%s failed", run.title, exc_info=error)
        return dataclasses.replace(result, error="".join(traceback.format_exception(error)))


def _sharing_trajectories(recipe: Recipe, directory: Path) -> Recipe:
    """The recipe with a place for recorded trajectories: cells whose calibration records the same share the record."""
    if recipe.calibration is None or recipe.calibration.cache is not None:
        return recipe
    calibration = recipe.calibration.model_copy(update={"cache": str(directory)})
    return recipe.model_copy(update={"calibration": calibration})


def _agreement_prompts(ablation: Ablation) -> list[str]:
    """Held-out prompts, the tasks taking turns."""
    tasks = [task for task in ablation.tasks if generates(task)] or ablation.tasks
    items = [take(task, "heldout", ablation.agreement_prompts) for task in tasks]
    return [item.prompt for group in zip(*items, strict=True) for item in group][: ablation.agreement_prompts]


def _linear_bytes(model: PreTrainedModel) -> float:
    """Bytes per weight of the layers recipes quantize, in a model that is not quantized."""
    adapter = adapter_for(model)
    if adapter.arrange is not None:
        adapter.arrange(model)
    weights: list[Tensor] = [module.get_parameter("weight") for _, module in adapter.linears(model)]
    return sum(weight.nbytes for weight in weights) / sum(weight.numel() for weight in weights)


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak starts anew from here
    except OSError:
        logger.debug("the peak memory of the process cannot be reset; it is that of all runs so far")


def _peak_memory(device: str) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_memory()


def _finished(run: PlannedRun, result: RunResult) -> str:
    if result.error is not None:
        return f"failed: {run.title}: {last_line(result.error)}"
    scores = ", ".join(f"{task} {100 * score.accuracy:.1f}%" for task, score in result.scores.items())
    return f"finished: {run.title}: {scores} ({sum(result.seconds.values()):.1f} s)"
