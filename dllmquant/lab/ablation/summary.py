"""The summary of an ablation: results pooled over seeds, compared in pairs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllmquant.lab.ablation.document import REFERENCE, Ablation
from dllmquant.lab.ablation.plan import AblationPlan, PlannedRun
from dllmquant.lab.ablation.result import RunResult, last_line
from dllmquant.lab.agreement import (
    BUCKETS,
    KLBucket,
    divergence_summary,
)
from dllmquant.lab.evaluate import ItemResult
from dllmquant.lab.statistics import (
    PairedDifference,
    RecoveredShare,
    paired_difference_clustered,
    recovered_share,
)


@dataclass(frozen=True)
class Numbers:
    """A cell of one model in numbers, over its seeds.

    Attributes:
        n: Problems that are pooled; every one is answered once per seed.
        accuracy: By task, mean over seeds.
        pooled: Accuracy over the pooled tasks, mean over seeds.
        difference: Of the pooled accuracy to the original's, paired by problem; None without the original.
        recovered: Share of its baseline's loss that the cell recovers; None without one, or where there is no loss.
        same_text: Share of the pooled problems with exactly the original's text, mean over seeds.
        divergence_step: Median first step, from 1, that commits something else; None if half of the runs never do.
        never_diverges: Share of the prompts that never do.
        frontier_flips: Share of the original's states at which something else would be committed.
        token_flips: Share of the original's committed positions with another most likely token.
        kl: Nats per masked position, one for each of `BUCKETS`; None where it is empty.
        truncation_rate: Share of the pooled generations without an end, mean over seeds.
        forward_passes: Calls of the model on the pooled tasks, mean over seeds.
        bytes_per_weight: Bytes per weight of the quantized layers, mean over seeds.
        total_bytes: Bytes of all weights, mean over seeds.
        seconds: Wall time of all runs by phase.
        peak_memory_bytes: The largest of any run; None where the platform does not tell.
    """

    n: int
    accuracy: dict[str, float]
    pooled: float
    difference: PairedDifference | None
    recovered: RecoveredShare | None
    same_text: float | None
    divergence_step: float | None
    never_diverges: float
    frontier_flips: float
    token_flips: float
    kl: tuple[float | None, ...]
    truncation_rate: float
    forward_passes: float
    bytes_per_weight: float
    total_bytes: float
    seconds: dict[str, float]
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Row:
    """A cell of one model.

    Attributes:
        model: Name of the model.
        cell: Name of the cell.
        protocol: What is quantized at run time; empty for the model itself.
        summary: The recipe in a line; empty for the model itself.
        baseline: The cell whose loss is to be recovered, if any.
        seeds: Seeds that are measured.
        planned: Number of seeds planned.
        numbers: None when no seed is measured.
        errors: Last lines of the errors of the runs that failed.
    """

    model: str
    cell: str
    protocol: str
    summary: str
    baseline: str | None
    seeds: tuple[int, ...]
    planned: int
    numbers: Numbers | None
    errors: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Two cells on the same problems.

    Attributes:
        model: Name of the model; "all models" when they are pooled, problem by problem.
        first: The cell that a positive difference speaks for.
        second: The other cell.
        runs: Runs of first and of second.
        difference: Accuracy of first minus that of second.
    """

    model: str
    first: str
    second: str
    runs: tuple[int, int]
    difference: PairedDifference


@dataclass(frozen=True)
class Summary:
    """The results of an ablation, as far as there are any.

    Attributes:
        rows: By model and cell, the model itself first.
        comparisons: In the order asked for, model by model, then all models.
        finished: Runs that are measured.
        planned: All runs.
        code: Versions of the code that measured them, in the order of the runs.
    """

    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    finished: int
    planned: int
    code: tuple[str, ...]


ALL_MODELS = "all models"


def summarize(plan: AblationPlan, results: Mapping[PlannedRun, RunResult]) -> Summary:
    """Turns results into numbers; the same results always give the same numbers.

    Args:
        plan: The plan.
        results: Results of some of its runs, including failures.
    """
    good: dict[tuple[str, str], list[RunResult]] = {}
    rows = []
    for run in plan.runs:
        if run in results and results[run].error is None:
            good.setdefault((run.model, run.cell), []).append(results[run])
    for (model, cell), runs in _by_cell(plan).items():
        done = good.get((model, cell), [])
        baseline = _baseline(plan.ablation, cell)
        recipe = runs[0].recipe
        errors = [results[run].error for run in runs if run in results]
        rows.append(
            Row(
                model=model,
                cell=cell,
                protocol="" if recipe is None else recipe.protocol,
                summary="" if recipe is None else recipe.summary(),
                baseline=baseline,
                seeds=tuple(result.seed for result in done),
                planned=len(runs),
                numbers=_numbers(done, good.get((model, REFERENCE), []), good.get((model, baseline or ""), []))
                if done
                else None,
                errors=tuple(last_line(error) for error in errors if error is not None),
            )
        )
    finished = [result for runs in good.values() for result in runs]
    code = [f"{result.metadata['dllmquant']} ({result.metadata.get('git_sha') or 'no git'})" for result in finished]
    return Summary(
        tuple(rows), tuple(_comparisons(plan, good)), len(finished), len(plan.runs), tuple(dict.fromkeys(code))
    )


def _by_cell(plan: AblationPlan) -> dict[tuple[str, str], list[PlannedRun]]:
    grouped: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in plan.runs:
        grouped.setdefault((run.model, run.cell), []).append(run)
    return grouped


def _baseline(ablation: Ablation, cell: str) -> str | None:
    named = next((entry.baseline for entry in ablation.cells if entry.name == cell), None) or ablation.baseline
    return None if cell in (REFERENCE, named) else named


def _pooled(items: Sequence[ItemResult]) -> dict[tuple[str, str], ItemResult]:
    """The problems that are pooled: those answered by generating, if there are any."""
    generated = [item for item in items if item.steps > 0] or items
    return {(item.task, item.key): item for item in generated}


def _outcomes(results: Sequence[RunResult], order: Sequence[tuple[str, str]]) -> NDArray[np.bool_]:
    """Whether each problem is right in each run, [problems, runs]."""
    columns = [_pooled(result.items) for result in results]
    return np.array([[column[name].correct for column in columns] for name in order], dtype=np.bool_)


def _numbers(done: Sequence[RunResult], reference: Sequence[RunResult], baseline: Sequence[RunResult]) -> Numbers:
    order = list(_pooled(done[0].items))
    right = _outcomes(done, order)
    difference, recovered, same = None, None, None
    if reference:
        full = _outcomes(reference, order)
        difference = paired_difference_clustered(full, right)
        texts = _pooled(reference[0].items)
        equal = [item.completion == texts[name].completion for run in done for name, item in _pooled(run.items).items()]
        same = sum(equal) / len(equal)
        if baseline:
            recovered = recovered_share(full, _outcomes(baseline, order), right)
    agreements = [result.agreement for result in done if result.agreement is not None]
    median, never = divergence_summary([step for each in agreements for step in each.first_divergence])
    frontiers = [each.frontier for each in agreements]
    tasks = {task for task, _ in order}
    return Numbers(
        n=len(order),
        accuracy={task: _mean([run.scores[task].accuracy for run in done]) for task in done[0].scores},
        pooled=float(right.mean()),
        difference=difference,
        recovered=recovered,
        same_text=same,
        divergence_step=median,
        never_diverges=never,
        frontier_flips=sum(each.flips for each in frontiers) / sum(each.states for each in frontiers),
        token_flips=sum(each.token_flips for each in frontiers) / sum(each.positions for each in frontiers),
        kl=tuple(_pooled_kl([each.kl[index] for each in agreements]) for index in range(len(BUCKETS))),
        truncation_rate=_mean([item.truncated for run in done for item in _pooled(run.items).values()]),
        forward_passes=_mean([sum(run.scores[task].forward_passes for task in tasks) for run in done]),
        bytes_per_weight=_mean([run.bytes_per_weight for run in done]),
        total_bytes=_mean([run.total_bytes for run in done]),
        seconds={phase: sum(run.seconds[phase] for run in done) for phase in done[0].seconds},
        peak_memory_bytes=max(run.metadata.get("peak_memory_bytes") or 0 for run in done) or None,
    )


def _pooled_kl(buckets: Sequence[KLBucket]) -> float | None:
    filled = [(bucket.mean, bucket.positions) for bucket in buckets if bucket.mean is not None]
    return sum(mean * count for mean, count in filled) / sum(count for _, count in filled) if filled else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _comparisons(plan: AblationPlan, good: Mapping[tuple[str, str], Sequence[RunResult]]) -> Iterator[Comparison]:
    """All pairs that have results; over all models only if each of them has all its seeds."""
    pairs = plan.ablation.compare or [(cell.name, REFERENCE) for cell in plan.ablation.cells]
    names = [model.name for model in plan.models]
    planned = _by_cell(plan)
    for first, second in pairs:
        arrays = []
        for model in names:
            runs = [good.get((model, cell), []) for cell in (first, second)]
            if not all(runs):
                continue
            order = list(_pooled(runs[0][0].items))
            answers = [_outcomes(each, order) for each in runs]
            yield Comparison(
                model, first, second, (len(runs[0]), len(runs[1])), paired_difference_clustered(answers[1], answers[0])
            )
            if all(len(each) == len(planned[model, cell]) for each, cell in zip(runs, (first, second), strict=True)):
                arrays.append(answers)
        if len(names) > 1 and len(arrays) == len(names):
            ours, theirs = (np.concatenate(columns, axis=1) for columns in zip(*arrays, strict=True))
            yield Comparison(
                ALL_MODELS,
                first,
                second,
                (ours.shape[1], theirs.shape[1]),
                paired_difference_clustered(theirs, ours),
            )
