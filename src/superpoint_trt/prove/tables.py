"""One table of several models, for papers and issues: Markdown, CSV or LaTeX, by the file's ending."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from superpoint_trt.core.files import PathLike, write_atomically
from superpoint_trt.core.types import SuperPointError

Cell = Union[str, int, float, None]
"""None: not defined. A float is rounded; an int and a text stand as they are."""

SUFFIXES = (".md", ".csv", ".tex")
DIGITS = 3
"""After the point, in Markdown and LaTeX. CSV has six, for further computation."""
_CSV_DIGITS = 6


@dataclass(frozen=True)
class Column:
    """A column's name, and which of its figures is set in bold."""

    name: str
    best: str = ""
    """"high", "low", or "": none is the best."""


@dataclass(frozen=True)
class Table:
    """Rows of figures; the first column names the row."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]

    def is_best(self, row: int, column: int) -> bool:
        """Whether a figure is the best of its column; equal ones as they are printed all are."""
        best, value = self.columns[column].best, self.rows[row][column]
        cells = [one[column] for one in self.rows]
        rivals = [float(cell) for cell in cells if isinstance(cell, (int, float))]
        if not best or not isinstance(value, (int, float)) or len(rivals) < 2:
            return False
        return text_of(float(value)) == text_of((max if best == "high" else min)(rivals))


def check_table_name(path: PathLike) -> None:
    """Checks that a file name ends in a kind of table.

    Raises:
        SuperPointError: it does not; the text names the endings.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise SuperPointError(f"{path}: a table's name ends in .md (Markdown), .csv or .tex (LaTeX).")


def write_table(path: PathLike, table: Table) -> Path:
    """Writes a table. A reader sees the old file or the whole new one.

    Raises:
        SuperPointError: the name ends in no kind of table, or the file cannot be written.
    """
    check_table_name(path)
    write = {".md": to_markdown, ".csv": to_csv, ".tex": to_latex}[Path(path).suffix.lower()]
    return write_atomically(path, write(table).encode())


def to_markdown(table: Table) -> str:
    """The table in GitHub's Markdown, the best figures in bold."""
    lines = [[column.name for column in table.columns], ["---", *["---:"] * (len(table.columns) - 1)]]
    for index, row in enumerate(table.rows):
        cells = [text_of(cell).replace("|", "\\|") for cell in row]
        lines.append([f"**{cell}**" if table.is_best(index, at) else cell for at, cell in enumerate(cells)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_csv(table: Table) -> str:
    """The table as comma-separated values; a figure that is not defined is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([column.name for column in table.columns])
    for row in table.rows:
        writer.writerow(["" if cell is None else text_of(cell, _CSV_DIGITS) for cell in row])
    return file.getvalue()


def to_latex(table: Table) -> str:
    """The table as a LaTeX `tabular` with the rules of booktabs, the best figures in bold."""
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", "\\toprule"]
    lines += [" & ".join(_latex(column.name) for column in table.columns) + " \\\\", "\\midrule"]
    for index, row in enumerate(table.rows):
        cells = [_latex(text_of(cell)) for cell in row]
        bold = [f"\\textbf{{{cell}}}" if table.is_best(index, at) else cell for at, cell in enumerate(cells)]
        lines.append(" & ".join(bold) + " \\\\")
    return "\n".join(["% needs \\usepackage{booktabs}", *lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def text_of(cell: Cell, digits: int = DIGITS) -> str:
    """A cell as it is printed."""
    if cell is None:
        return "-"
    return f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
