import ast
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colors
from matplotlib.container import ErrorbarContainer

from dllmquant.lab import plots
from dllmquant.lab.evaluate import TaskScore
from dllmquant.lab.plots import plot_demo, plot_differences
from dllmquant.lab.statistics import PairedDifference, wilson_interval
from dllmquant.lab.stepwise import Curve, StepErrors


def score(right: int, n: int = 20) -> TaskScore:
    low, high = wilson_interval(right, n)
    return TaskScore(n, right / n, low, high, right / n, 0.0, 1, 1.0, 1, 1.0)


def errors(scale: float) -> StepErrors:
    mean = tuple(scale / (step + 1) for step in range(4))
    curve = Curve(mean, tuple(0.8 * value for value in mean), tuple(1.3 * value for value in mean))
    return StepErrors(curve, curve)


SCORES = {
    "16-bit": {"math": score(18), "code": score(20)},
    "a": {"math": score(10), "code": score(0)},
    "b": {"math": score(13), "code": score(17)},
}
ERRORS = {"a": errors(1.0), "b": errors(0.1)}


def figure(scores=SCORES, by_model=ERRORS):
    return plots._figure(scores, by_model, "16-bit", "the title", (2,))


def test_writes_a_png(tmp_path: Path) -> None:
    paths = [tmp_path / "new" / "a.png", tmp_path / "b.png"]
    for path in paths:
        assert plot_demo(path, scores=SCORES, errors=ERRORS, baseline="16-bit", title="t", block_starts=(2,)) == path
    first, second = (path.read_bytes() for path in paths)
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(first[start : start + 4], "big") for start in (16, 20))
    assert width > 1500
    assert height > 600
    assert first == second


def test_bars_are_the_accuracies_with_their_intervals() -> None:
    left = figure().axes[0]
    bars = [container for container in left.containers if hasattr(container, "patches")]
    assert [bar.get_label() for bar in bars] == ["16-bit", "a", "b"]
    for bar, by_task in zip(bars, SCORES.values(), strict=True):
        assert [patch.get_height() for patch in bar.patches] == [value.accuracy for value in by_task.values()]
        segments = bar.errorbar.lines[2][0].get_segments()
        ends = [(segment[0][1], segment[1][1]) for segment in segments]
        assert ends == [pytest.approx((value.low, value.high)) for value in by_task.values()]
    assert [label.get_text() for label in left.get_xticklabels()] == ["math", "code"]
    dashed = [segment for lines in left.collections for segment in lines.get_segments() if len(segment) == 2]
    assert {segment[0][1] for segment in dashed} >= {0.9, 1.0}


def test_curves_are_the_errors() -> None:
    right = figure().axes[1]
    curves = {line.get_label(): line for line in right.lines if not line.get_label().startswith("_")}
    assert list(curves) == ["a", "b"]
    for name, line in curves.items():
        assert list(line.get_xdata()) == [1, 2, 3, 4]
        assert tuple(line.get_ydata()) == ERRORS[name].kl.mean
    assert right.get_yscale() == "linear"
    assert right.get_ylim()[0] == 0
    assert [line.get_xdata()[0] for line in right.lines if line.get_label().startswith("_")] == [2.5]
    for axes in figure().axes:
        assert axes.get_title(loc="left")
        assert axes.get_ylabel()
    assert "[nats]" in right.get_ylabel()


def test_a_model_has_one_color_in_both_panels_and_models_differ() -> None:
    left, right = figure().axes
    bars = {bar.get_label(): bar.patches[0].get_facecolor() for bar in left.containers if hasattr(bar, "patches")}
    for line in right.lines:
        if not line.get_label().startswith("_"):
            assert colors.to_rgba(line.get_color()) == bars[line.get_label()]
    assert len(set(bars.values())) == 3
    (legend,) = figure().legends
    assert [text.get_text() for text in legend.get_texts()] == ["16-bit", "a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "8-bit"}, "baseline is '8-bit'; valid: 16-bit, a, b"),
        ({"scores": SCORES | {"b": {"math": score(1)}}}, r"scores\['b'\] holds \['math'\]; valid: \['math', 'code'\]"),
        ({"errors": {"c": errors(1.0)}}, "errors holds 'c'"),
        ({"errors": {"16-bit": errors(1.0)}}, "errors holds '16-bit'"),
    ],
)
def test_input_that_does_not_fit(tmp_path: Path, changes, message: str) -> None:
    arguments = {"scores": SCORES, "errors": ERRORS, "baseline": "16-bit", "title": "t"} | changes
    with pytest.raises(ValueError, match=message):
        plot_demo(tmp_path / "x.png", **arguments)
    assert not list(tmp_path.iterdir())


# differences


def paired(points: float, half: float) -> PairedDifference:
    return PairedDifference(points / 100, (points - half) / 100, (points + half) / 100, 0.5, 40, 1, 1)


DIFFERENCES: dict[str, dict[str, PairedDifference | None]] = {
    "natural": {"rtn": paired(-20, 5), "best": paired(-1, 2)},
    "stress": {"rtn": paired(-60, 6), "best": None},
}


def test_dots_are_the_differences_with_their_intervals() -> None:
    drawn = plots._differences_figure(DIFFERENCES, ["rtn", "best"], "16-bit", "the title")
    assert len(drawn.axes) == 2
    for axes, (model, by_cell) in zip(drawn.axes, DIFFERENCES.items(), strict=True):
        assert axes.get_title(loc="left") == f"{model} (n = 40)"
        rows = {row: each for row, each in enumerate(by_cell.values()) if each is not None}
        assert len(axes.containers) == len(rows)
        for container, (row, each) in zip(axes.containers, rows.items(), strict=True):
            assert isinstance(container, ErrorbarContainer)
            dot, _, bars = container.lines
            assert list(np.ravel(dot.get_xdata())) == [pytest.approx(100 * each.difference)]
            assert list(np.ravel(dot.get_ydata())) == [row]
            ((left, _), (right, _)) = bars[0].get_segments()[0]
            assert (left, right) == (pytest.approx(100 * each.low), pytest.approx(100 * each.high))
        assert [text.get_text() for text in axes.texts] == ["no result "] * (2 - len(rows))
    first = drawn.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["rtn", "best"]
    bottom, top = first.get_ylim()
    assert bottom > top  # the first cell on top
    assert first.get_xlim() == drawn.axes[1].get_xlim()
    assert "16-bit" in drawn.get_supxlabel()


def test_differences_as_a_png(tmp_path: Path) -> None:
    paths = [tmp_path / "new" / "a.png", tmp_path / "b.png"]
    for path in paths:
        assert plot_differences(path, DIFFERENCES, reference="16-bit", title="t") == path
    first, second = (path.read_bytes() for path in paths)
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    assert first == second


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        ({}, "differences holds {}; valid: at least one model with at least one cell"),
        ({"a": {}}, "valid: at least one model"),
        ({"a": {"x": None}, "b": {"y": None}}, r"differences\['b'\] holds \['y'\]; valid: \['x'\]"),
    ],
)
def test_differences_that_do_not_fit(tmp_path: Path, differences, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_differences(tmp_path / "x.png", differences, reference="16-bit", title="t")
    assert not list(tmp_path.iterdir())


def test_no_global_state_of_pyplot() -> None:
    names = {
        alias.name
        for node in ast.walk(ast.parse(Path(plots.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in (*node.names, ast.alias(getattr(node, "module", "") or ""))
    }
    assert not any("pyplot" in name or name == "matplotlib.use" for name in names)
