import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from dllmquant.core.coverage import Coverage
from dllmquant.lab import checkpoint_plots
from dllmquant.lab.checkpoint_plots import plot_checkpoint
from dllmquant.lab.inspection import ActivationBits

STATES = ((0, 0, 0, 3), (0, 0, 0, 0), (1, 2, 0, 0), (4, 0, 0, 0))
COVERAGE = Coverage(STATES, STATES, STATES, ((0, 0, 0, 8), (0, 0, 5, 0), (1, 8, 0, 0), (9, 0, 0, 0)))
BITS = ActivationBits(("q+k+v", "o", "up"), (((4,), (4, 8, 4, 4), (8,)), ((8,), (8, 8, 8, 8), ())), 5.5)


def drawn(coverage: Coverage | None = COVERAGE, bits: ActivationBits | None = BITS):
    return checkpoint_plots._figure(coverage, bits, "the title")


@pytest.mark.parametrize(
    ("coverage", "bits", "inches"),
    [(COVERAGE, BITS, (5.2 + 5.65, 3.6)), (COVERAGE, None, (5.2, 3.6)), (None, BITS, (5.65, 3.6))],
    ids=["both", "coverage", "bits"],
)
def test_writes_a_png(tmp_path: Path, coverage, bits, inches) -> None:
    paths = [tmp_path / "new" / "a.png", tmp_path / "b.png"]
    for path in paths:
        assert plot_checkpoint(path, coverage=coverage, bits=bits, title="t") == path
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    pixels = image.imread(io.BytesIO(first), format="png")
    assert pixels.shape[:2] == (int(150 * inches[1]), int(150 * inches[0]))
    assert np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 10


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither calibration states nor allocated bits"):
        plot_checkpoint(tmp_path / "x.png", coverage=None, bits=None, title="t")
    assert not list(tmp_path.iterdir())


def test_coverage_is_a_map_of_the_states() -> None:
    (axes,) = drawn(bits=None).axes
    (picture,) = axes.images
    assert picture.get_array().tolist() == [list(row) for row in STATES]
    assert picture.get_clim() == (0, 4)
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first segment on top
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(texts) == 16
    assert (texts[3, 0], texts[2, 1], texts[0, 3], texts[0, 0]) == ("3/8", "0/5", "4/9", "0")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0-25%", "25-50%", "50-75%", "75-100%"]
    assert [label.get_text() for label in axes.get_yticklabels()][1] == "2 (25-50%)"
    assert axes.get_title(loc="left") == "Calibration states (selected/recorded, n = 10)"


def test_cells_that_are_reachable_but_empty_are_marked() -> None:
    (axes,) = drawn(bits=None).axes
    (patch,) = axes.patches
    x, y = patch.get_xy()
    assert (x + patch.get_width() / 2, y + patch.get_height() / 2) == pytest.approx((2, 1))
    assert patch.get_hatch()
    assert "hatched" in axes.get_xlabel()
    full = Coverage(((0, 3), (3, 0)), ((0, 1), (1, 0)), ((0, 1), (1, 0)))
    (axes,) = drawn(full, None).axes
    assert not axes.patches
    assert axes.get_xlabel() == "mask ratio"
    assert axes.get_title(loc="left") == "Calibration states (n = 6)"


def test_bits_are_a_map_of_the_means() -> None:
    (axes,) = drawn(coverage=None).axes
    (picture,) = axes.images
    means = np.ma.filled(picture.get_array(), np.nan)
    assert means[:, :2].tolist() == [[4, 5], [8, 8]]
    assert means[0, 2] == 8
    assert np.isnan(means[1, 2])
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert (texts[0, 0], texts[1, 0], texts[2, 1]) == ("4", "4/8/4/4", "-")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q\nk\nv", "o", "up"]
    assert axes.get_title(loc="left") == "Activation bits (mean 5.50 per value)"


def test_both_stand_side_by_side_and_many_blocks_make_it_higher() -> None:
    left, right = drawn().axes
    assert left.get_title(loc="left").startswith("Calibration")
    assert right.get_title(loc="left").startswith("Activation")
    many = ActivationBits(BITS.sites, BITS.bits * 16, 5.5)
    assert drawn(bits=many).get_figheight() == pytest.approx(1.9 + 0.3 * 32)
