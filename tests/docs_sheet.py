"""Sheets of the documentation: calculations with pencil and paper, line by line, as `name = expression = result    plan: place`.

An expression may use the names of earlier lines of the page. The result must be right to the digits that are printed, and what stands at
the place in the JSON file that the sheet names must be the same; entries of a list are found by their `operator`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

LINE = re.compile(r"(\w+)\s+= (.+?)(?:\s+= (\S+))?(?:\s+plan: (\S+))?")


def check_sheet(text: str, plan: Path, names: dict[str, float]) -> None:
    """Compute the lines, with `names` so far, which grows. Raises `AssertionError` with the line that is wrong."""
    document = json.loads(plan.read_text())
    for line in filter(str.strip, text.splitlines()):
        found = LINE.fullmatch(line.rstrip())
        assert found, f"not a line of a sheet: {line}"
        name, expression, result, place = found.groups()
        value = names[name] = eval(expression, {"__builtins__": {}, "max": max}, dict(names))
        assert result is None or abs(value - float(result)) <= 0.51 * last_digit(result), f"{line.strip()}: it is {value!r}"
        if place is not None:
            said = look_up(document, place)
            assert abs(value - said) <= 1e-5 * abs(said), f"{line.strip()}: the plan says {said!r}, the sheet {value!r}"


def last_digit(number: str) -> float:
    """What one more in the last printed digit is worth; for a whole number 1."""
    mantissa, _, exponent = number.lower().partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def look_up(document: Any, place: str) -> float:
    """The number at a path of keys."""
    for key in place.split("."):
        document = document[key] if isinstance(document, dict) else next(entry for entry in document if entry.get("operator") == key)
    return document
