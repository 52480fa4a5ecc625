import csv
import io

import pytest

from dllmquant.lab.tables import aligned, comma_separated, markdown

HEADER = ["model", "n", "bytes"]
ROWS = [["a|b", "1", "2,000"], ["longer name", "10", ""]]


def test_aligned() -> None:
    assert aligned(HEADER, ROWS).splitlines() == [
        "model         n  bytes",
        "-----------  --  -----",
        "a|b           1  2,000",
        "longer name  10",
    ]


def test_aligned_left_columns() -> None:
    assert aligned(["a", "b"], [["1", "22"], ["333", "4"]], left=2).splitlines() == [
        "a    b",
        "---  --",
        "1    22",
        "333  4",
    ]


def test_markdown() -> None:
    assert markdown(HEADER, ROWS).splitlines() == [
        "| model | n | bytes |",
        "| --- | ---: | ---: |",
        "| a\\|b | 1 | 2,000 |",
        "| longer name | 10 |  |",
    ]


def test_comma_separated() -> None:
    text = comma_separated(HEADER, [*ROWS, ['say "x"', "a\nb", "−1"]])
    assert text.startswith('model,n,bytes\na|b,1,"2,000"\nlonger name,10,\n')
    assert list(csv.reader(io.StringIO(text)))[-1] == ['say "x"', "a\nb", "−1"]


@pytest.mark.parametrize("render", [aligned, markdown, comma_separated])
def test_ragged_rows(render) -> None:
    with pytest.raises(ValueError, match=r"rows\[1\] has 2 cells; valid: 3"):
        render(HEADER, [["1", "2", "3"], ["1", "2"]])
