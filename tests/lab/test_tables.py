import pytest

from dllmquant.lab.tables import aligned, markdown

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


@pytest.mark.parametrize("render", [aligned, markdown])
def test_ragged_rows(render) -> None:
    with pytest.raises(ValueError, match=r"rows\[1\] has 2 cells; valid: 3"):
        render(HEADER, [["1", "2", "3"], ["1", "2"]])
