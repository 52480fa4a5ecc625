"""Figures, drawn off screen: no window system and no state of pyplot is involved."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MultipleLocator, PercentFormatter

from dllmquant.lab.evaluate import TaskScore
from dllmquant.lab.statistics import PairedDifference
from dllmquant.lab.stepwise import StepErrors

# Of Okabe and Ito's palette, which people with any kind of colour blindness can tell apart.
COLORS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
BASELINE_COLOR = "#8A8A8A"
MARKERS = ("s", "^", "o", "D", "v", "P")


def plot_demo(
    path: str | Path,
    *,
    scores: Mapping[str, Mapping[str, TaskScore]],
    errors: Mapping[str, StepErrors],
    baseline: str,
    title: str,
    block_starts: Sequence[int] = (),
) -> Path:
    """Draws accuracies beside the error at every denoising step and writes them as a PNG.

    Args:
        path: The file to write.
        scores: Scores by model and task; the same tasks for every model.
        errors: Error curves by model; the baseline has none.
        baseline: The model of `scores` that the others are held against.
        title: Over the whole figure.
        block_starts: Steps, counted from 0, at which the sampler enters a new block.

    Returns:
        The path.

    Raises:
        ValueError: `baseline` is not one of the models, models have different tasks, or a model has a curve but no
            scores.
    """
    _check(scores, errors, baseline)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = _figure(scores, errors, baseline, title, block_starts)
    # The software's version would make files differ between installations.
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})
    return path


def plot_differences(
    path: str | Path,
    differences: Mapping[str, Mapping[str, PairedDifference | None]],
    *,
    reference: str,
    title: str,
) -> Path:
    """Draws accuracy differences to a reference, a dot with its interval each, and writes them as a PNG.

    Args:
        path: The file to write.
        differences: By model and cell, the same cells in the same order for every model; None where a cell has no
            result, which is written in its place.
        reference: What the differences are to.
        title: Over the whole figure.

    Returns:
        The path.

    Raises:
        ValueError: There is no model or no cell, or models have different cells.
    """
    cells = [list(by_cell) for by_cell in differences.values()]
    if not cells or not cells[0]:
        raise ValueError(f"differences holds {dict(differences)!r}; valid: at least one model with at least one cell")
    for model, names in zip(differences, cells, strict=True):
        if names != cells[0]:
            raise ValueError(f"differences[{model!r}] holds {names}; valid: {cells[0]}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = _differences_figure(differences, cells[0], reference, title)
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})
    return path


def _differences_figure(
    differences: Mapping[str, Mapping[str, PairedDifference | None]], cells: Sequence[str], reference: str, title: str
) -> Figure:
    figure = Figure(
        figsize=(2.6 + 3.4 * len(differences), 1.7 + 0.3 * len(cells)),
        layout=ConstrainedLayoutEngine(wspace=0.04, w_pad=0.08, h_pad=0.06),
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(differences), sharex=True, sharey=True, squeeze=False)[0]
    for index, (axes, (model, by_cell)) in enumerate(zip(panels, differences.items(), strict=True)):
        _draw_differences(axes, by_cell, _color(index + 1))
        counts = sorted({paired.n for paired in by_cell.values() if paired is not None})
        axes.set_title(f"{model} (n = {', '.join(map(str, counts)) or 0})", fontsize=10.5, loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="#E3E3E3", linewidth=0.8)
    panels[0].set_yticks(range(len(cells)), labels=cells)
    panels[0].set_ylim(len(cells) - 0.4, -0.6)  # the first cell on top
    figure.supxlabel(f"accuracy minus {reference}'s [percentage points]; whiskers: 95% interval", fontsize=10)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def _draw_differences(axes: Axes, by_cell: Mapping[str, PairedDifference | None], color: str) -> None:
    axes.axvline(0, color="#444444", linestyle="--", linewidth=0.9)
    for row, paired in enumerate(by_cell.values()):
        if paired is None:
            axes.annotate("no result ", (0, row), ha="right", va="center", fontsize=8)
            continue
        # A percentile interval may leave the estimate out by a resample's width.
        below, above = (
            100 * max(0.0, side) for side in (paired.difference - paired.low, paired.high - paired.difference)
        )
        axes.errorbar(
            100 * paired.difference,
            row,
            xerr=([below], [above]),
            color=color,
            marker="o",
            markersize=5,
            capsize=3,
            elinewidth=1.3,
            linestyle="none",
        )


def _figure(
    scores: Mapping[str, Mapping[str, TaskScore]],
    errors: Mapping[str, StepErrors],
    baseline: str,
    title: str,
    block_starts: Sequence[int],
) -> Figure:
    others = [name for name in scores if name != baseline]
    styles = {name: index for index, name in enumerate(others)}
    figure = Figure(figsize=(11.5, 4.9), layout=ConstrainedLayoutEngine(wspace=0.04, w_pad=0.08, h_pad=0.06))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_accuracies(left, scores, baseline, others)
    _draw_errors(right, errors, baseline, styles, block_starts)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def _draw_accuracies(
    axes: Axes, scores: Mapping[str, Mapping[str, TaskScore]], baseline: str, others: Sequence[str]
) -> None:
    tasks = list(scores[baseline])
    models = [baseline, *others]
    width = 0.82 / len(models)
    for index, name in enumerate(models):
        centres = [task + (index - (len(models) - 1) / 2) * width for task in range(len(tasks))]
        values = [scores[name][task] for task in tasks]
        below = [max(0.0, score.accuracy - score.low) for score in values]
        above = [max(0.0, score.high - score.accuracy) for score in values]
        axes.bar(
            centres,
            [score.accuracy for score in values],
            width=0.92 * width,
            color=BASELINE_COLOR if name == baseline else _color(index - 1),
            label=name,
            yerr=(below, above),
            error_kw={"ecolor": "#222222", "elinewidth": 1.1, "capsize": 3},
        )
        for centre, score in zip(centres, values, strict=True):
            axes.annotate(
                f"{100 * score.accuracy:.1f}",
                (centre, score.high),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
                bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            )
    for task, name in enumerate(tasks):
        axes.hlines(
            scores[baseline][name].accuracy, task - 0.44, task + 0.44, colors="#444444", linestyles="--", linewidth=0.9
        )
    counts = sorted({score.n for by_task in scores.values() for score in by_task.values()})
    axes.set_xticks(range(len(tasks)), labels=tasks)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.1)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("accuracy on held-out problems")
    axes.set_title(
        f"Accuracy (n = {', '.join(map(str, counts))} per task; whiskers: 95% interval)", fontsize=10.5, loc="left"
    )


def _draw_errors(
    axes: Axes, errors: Mapping[str, StepErrors], baseline: str, styles: Mapping[str, int], block_starts: Sequence[int]
) -> None:
    # The first step sits at 1; a block starts between two steps.
    for start in block_starts:
        axes.axvline(start + 0.5, color="#BBBBBB", linewidth=0.9, linestyle=":")
    for name, error in errors.items():
        steps = range(1, len(error.kl.mean) + 1)
        color = _color(styles[name])
        axes.fill_between(steps, error.kl.low, error.kl.high, color=color, alpha=0.13, linewidth=0)
        axes.plot(
            steps,
            error.kl.mean,
            color=color,
            marker=MARKERS[styles[name] % len(MARKERS)],
            markersize=4,
            linewidth=1.6,
            label=name,
        )
    axes.set_ylim(bottom=0)  # not logarithmic: what matters is the error's size, not how close to nothing it gets
    length = max((len(error.kl.mean) for error in errors.values()), default=1)
    axes.set_xlim(0.3, length + 0.7)
    axes.xaxis.set_major_locator(MultipleLocator(max(1, round(length / 8))))
    note = "; dotted: next block" if block_starts else ""
    axes.set_xlabel(f"denoising step of the {baseline} model{note}")
    axes.set_ylabel(f"KL({baseline} ‖ quantized) per masked token [nats]")
    axes.set_title(f"Error on the {baseline} model's states (band: 95% interval)", fontsize=10.5, loc="left")


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _check(scores: Mapping[str, Mapping[str, TaskScore]], errors: Mapping[str, StepErrors], baseline: str) -> None:
    if baseline not in scores:
        raise ValueError(f"baseline is {baseline!r}; valid: {', '.join(scores)}")
    for name, by_task in scores.items():
        if list(by_task) != list(scores[baseline]):
            raise ValueError(f"scores[{name!r}] holds {list(by_task)}; valid: {list(scores[baseline])}")
    for name in errors:
        if name not in scores or name == baseline:
            raise ValueError(f"errors holds {name!r}; valid: the models of scores other than {baseline!r}")
