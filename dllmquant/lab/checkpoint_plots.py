"""The figure of a checkpoint: where its calibration states lie, and how many bits its activations have.

Drawn off screen, as in `dllmquant.lab.plots`: no window system and no state of pyplot is involved.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from dllmquant.core.coverage import Coverage
from dllmquant.lab.inspection import ActivationBits, bits_text, bucket_texts, cell_text, segment_texts
from dllmquant.lab.plots import COLORS

_SHADES = LinearSegmentedColormap.from_list("shades", ["#FFFFFF", COLORS[1]])
_MISSING = COLORS[4]


def plot_checkpoint(path: str | Path, *, coverage: Coverage | None, bits: ActivationBits | None, title: str) -> Path:
    """Draws the coverage of the calibration states beside the activation bits, or one of them, as a PNG.

    Args:
        path: The file to write.
        coverage: Where in the denoising process the calibration states lie, or None.
        bits: The bits of every site, or None.
        title: Over the whole figure.

    Returns:
        The path.

    Raises:
        ValueError: There is neither.
    """
    if coverage is None and bits is None:
        raise ValueError("plot: nothing to draw; the checkpoint has neither calibration states nor allocated bits")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The software's version would make files differ between installations.
    _figure(coverage, bits, title).savefig(path, dpi=150, format="png", metadata={"Software": None})
    return path


def _figure(coverage: Coverage | None, bits: ActivationBits | None, title: str) -> Figure:
    widths, rows = [], []
    if coverage is not None:
        widths.append(max(4.8, 1.8 + 0.85 * coverage.buckets))
        rows.append(coverage.segments)
    if bits is not None:
        widths.append(max(4.2, 1.6 + 1.35 * len(bits.sites)))
        rows.append(len(bits.bits))
    figure = Figure(
        figsize=(sum(widths), max(3.6, 1.9 + 0.3 * max(rows))),
        layout=ConstrainedLayoutEngine(wspace=0.06, w_pad=0.08, h_pad=0.06),
    )
    FigureCanvasAgg(figure)
    panels = iter(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    if coverage is not None:
        _draw_coverage(next(panels), coverage)
    if bits is not None:
        _draw_bits(next(panels), bits)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def _draw_coverage(axes: Axes, coverage: Coverage) -> None:
    segments, buckets = range(coverage.segments), range(coverage.buckets)
    labels = [[cell_text(coverage, segment, bucket) for bucket in buckets] for segment in segments]
    _draw_map(axes, coverage.states, labels, top=max(1, *map(max, coverage.states)))
    missing = sorted(set(coverage.diagonal) & set(coverage.empty))
    for segment, bucket in missing:
        corner = (bucket - 0.46, segment - 0.46)
        axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, hatch="//", edgecolor=_MISSING, linewidth=1.4))
        axes.texts[segment * coverage.buckets + bucket].set(color="#222222", backgroundcolor="white")
    axes.set_xticks(buckets, labels=bucket_texts(coverage))
    axes.set_yticks(segments, labels=segment_texts(coverage))
    axes.set_xlabel("mask ratio" + (" (hatched: reachable, but empty)" if missing else ""))
    axes.set_ylabel("segment of the trajectory")
    counted = "" if coverage.recorded is None else "selected/recorded, "
    count = sum(map(sum, coverage.states))
    axes.set_title(f"Calibration states ({counted}n = {count})", fontsize=10.5, loc="left")


def _draw_bits(axes: Axes, bits: ActivationBits) -> None:
    means = [[sum(entry) / len(entry) if entry else float("nan") for entry in row] for row in bits.bits]
    widths = [width for row in bits.bits for entry in row for width in entry]
    _draw_map(axes, means, [[bits_text(entry) for entry in row] for row in bits.bits], top=max(widths))
    axes.set_xticks(range(len(bits.sites)), labels=[site.replace("+", "\n") for site in bits.sites])
    axes.set_yticks(range(len(bits.bits)))
    axes.set_ylabel("block")
    axes.set_title(f"Activation bits (mean {bits.mean:.2f} per value)", fontsize=10.5, loc="left")


def _draw_map(axes: Axes, values: Sequence[Sequence[float]], labels: Sequence[Sequence[str]], *, top: float) -> None:
    """Draws a table as colours with its labels, the first row on top."""
    axes.imshow(values, cmap=_SHADES, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    for row, entries in enumerate(labels):
        for column, label in enumerate(entries):
            dark = values[row][column] > 0.6 * top  # never of NaN, which is drawn white
            color = "white" if dark else "#999999" if label == "0" else "#222222"
            axes.text(column, row, label, ha="center", va="center", fontsize=8.5, color=color)
    axes.tick_params(length=0, labelsize=8.5)
    axes.spines[:].set_color("#BBBBBB")
