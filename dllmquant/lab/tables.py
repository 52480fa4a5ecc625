"""Tables as text: aligned columns for a terminal, Markdown for documents, comma-separated values for programs."""

import csv
import io
from collections.abc import Sequence


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Returns a table in columns two spaces apart, with a rule under its header.

    Args:
        header: Titles of the columns.
        rows: Cells, as many in each row as there are titles.
        left: How many of the first columns are left-aligned; the others hold numbers, aligned to the right.

    Raises:
        ValueError: A row has more or fewer cells than there are titles.
    """
    _check(header, rows)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Returns a table in Markdown.

    Args:
        header: Titles of the columns.
        rows: Cells, as many in each row as there are titles.
        left: How many of the first columns are left-aligned.

    Raises:
        ValueError: A row has more or fewer cells than there are titles.
    """
    _check(header, rows)
    rule = ["---" if index < left else "---:" for index in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (header, rule, *rows)
    )


def comma_separated(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as comma-separated values, quoted where needed, with a line feed after every row.

    Args:
        header: Titles of the columns.
        rows: Cells, as many in each row as there are titles.

    Raises:
        ValueError: A row has more or fewer cells than there are titles.
    """
    _check(header, rows)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def _check(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for index, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"rows[{index}] has {len(row)} cells; valid: {len(header)}, one for each title")
