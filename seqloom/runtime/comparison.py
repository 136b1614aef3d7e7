"""Predicted beside measured: the table that a dry run and a rehearsal print.

In: rows of figures in bytes, operations or seconds. Out: lines of text, each row in the unit that its largest figure asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Unit = Literal["memory", "bytes", "operations", "seconds"]
_SCALES: dict[Unit, tuple[tuple[float, str], ...]] = {
    "memory": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
    "bytes": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "operations": ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP")),
    "seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
}


@dataclass(frozen=True)
class Row:
    """One quantity: what the plan predicts (None where it says nothing) and what was found, one figure a column (None: not measured)."""

    quantity: str
    unit: Unit
    predicted: float | None
    found: tuple[float | None, ...]


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Lines of `quantity  unit  predicted  <columns>  predicted / largest found`. Rows without a figure other than zero are left out."""
    lines = [("", "", "predicted", *columns, "ratio")]
    for row in rows:
        figures = [figure for figure in (row.predicted, *row.found) if figure is not None]
        if not any(figures):
            continue
        scale, name = _scale(row.unit, max(figures))
        cells = ["-" if figure is None else f"{figure / scale:.2f}" for figure in (row.predicted, *row.found)]
        lines.append((row.quantity, name, *cells, _ratio(row)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    aligned = [[cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def _ratio(row: Row) -> str:
    largest = max((figure for figure in row.found if figure is not None), default=0.0)
    return "-" if row.predicted is None or not largest else f"{row.predicted / largest:.3f}"


def _scale(unit: Unit, largest: float) -> tuple[float, str]:
    return next((scale for scale in _SCALES[unit] if largest >= scale[0]), _SCALES[unit][-1])
