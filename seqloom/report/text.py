"""Numbers and layouts in words: three digits that matter, with their unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def number(value: float) -> str:
    """Three significant digits and no exponent: `0.0123`, `21.1`, `3,110`."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.2g}"
    return f"{value:#.3g}".rstrip(".")


def scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """The value in the first unit that it fills, else in the last one."""
    size, unit = next(((size, unit) for size, unit in units if abs(value) >= size), units[-1])
    return f"{number(value / size)} {unit}"


def seconds(value: float) -> str:
    """`21.1 s`, `4.20 ms`, `91.1 µs`."""
    return "0 s" if value == 0 else scaled(value, ((1.0, "s"), (1e-3, "ms"), (1e-6, "\u00b5s")))


def nbytes(value: float) -> str:
    """Bytes on a wire, in decimal units: `105 GB`."""
    return "0 B" if value == 0 else scaled(value, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")))


def flops(value: float) -> str:
    """`412 TFLOP`."""
    return scaled(value, ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP")))


def gib(value: float) -> str:
    """Memory: `57.9 GiB`."""
    return f"{number(value)} GiB"


def percent(value: float) -> str:
    """A share: `46.6%`."""
    return f"{value:.1%}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 rank`, `8 ranks`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def words(name: str) -> str:
    """A key as it is read: `all_to_all` -> `all to all`."""
    return name.replace("_", " ")


def clip(text: str, length: int) -> str:
    """The text, cut to a length with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "\u2026"


def join_words(parts: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = list(parts) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def mesh_text(mesh: str | Mapping[str, int]) -> str:
    """`sp 4 x tp 2`; axes of one rank are left out. A mesh that is told in words stays as it is."""
    if isinstance(mesh, str):
        return mesh
    return " \u00d7 ".join(f"{axis} {size}" for axis, size in mesh.items() if size != 1) or "one rank"


def storage_text(zero: int | None, sharded: Iterable[str] = (), replicated: Iterable[str] = ()) -> str:
    """`ZeRO 3 over dp and sp, a copy on each rank of node`; empty where no level was tried."""
    if zero is None:
        return ""
    over, copies = join_words(sharded), join_words(replicated)
    return f"ZeRO {zero}" + (f" over {over}" if over else "") + (f", a copy on each rank of {copies}" if copies else "")


def strategy_text(strategy: Mapping[str, str]) -> str:
    """`l@sp h@tp`; an axis over which the operator runs whole is said in words."""
    return " ".join(f"whole on {axis}" if letter == "whole" else f"{letter}@{axis}" for axis, letter in strategy.items()) or "one rank"


def count_text(value: float) -> str:
    """How many, in three digits: `8.03 billion`, `5.00 million`, `4,096`."""
    return scaled(value, ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))) if value >= 1e6 else f"{value:,.0f}"


def duration(value: float) -> str:
    """Seconds as people say them: `45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    minutes = round(value / 60)
    if value < 59.5:
        return f"{value:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
