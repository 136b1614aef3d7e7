"""Checked access to the JSON object of a description file: every wrong field is one sentence that names its place.

Role in the pipeline: `hardware.py` reads its files through `Fields`. A schema is a frozen dataclass; its fields with a default may be
left out of the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection
from typing import Any

from seqloom.errors import UserError


class Fields:
    """One JSON object under validation: typed access to its fields, each failure one sentence with the place."""

    def __init__(self, data: Any, where: str, names: Collection[str] | None = None, optional: Collection[str] = ()) -> None:
        """`names` are the fields that the object may have, all but the `optional` ones required; None for a free mapping."""
        self.data, self.where = data, where
        if not isinstance(data, dict):
            raise UserError(f"{where} must be a JSON object, not {data!r}")
        if names is None:
            return
        for key in data:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"the fields are {', '.join(names)}"
                raise UserError(f"{where} has an unknown field `{key}`: {hint}")
        missing = [name for name in names if name not in data and name not in optional]
        if missing:
            raise UserError(f"{where} lacks the field{'s' * (len(missing) > 1)} {', '.join(missing)}: add what is missing")

    @classmethod
    def of(cls, schema: type, data: Any, where: str) -> Fields:
        """`data` as an object with the fields of the dataclass `schema`."""
        fields = dataclasses.fields(schema)
        return cls(data, where, [field.name for field in fields], [field.name for field in fields if _has_default(field)])

    def has(self, key: str) -> bool:
        """Whether an optional field is given."""
        return key in self.data

    def text(self, key: str) -> str:
        """A text that is not empty."""
        value = self.data[key]
        if not (isinstance(value, str) and value):
            raise UserError(f"{self.where}: {key} must be a text, not {value!r}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of at least one text."""
        values = self.items(key)
        if not all(isinstance(value, str) and value for value in values):
            raise UserError(f"{self.where}: {key} must be a list of texts, not {values!r}")
        return tuple(values)

    def number(self, key: str, least: float | None = None, below: float = math.inf) -> float:
        """A finite number above 0, or from `least` on where that is given; under `below`."""
        value = self.data[key]
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value < below
        if not (good and (value > 0 if least is None else value >= least)):
            low = "above 0" if least is None else f"of at least {least:g}"
            high = f" and under {below:g}" if math.isfinite(below) else ""
            raise UserError(f"{self.where}: {key} must be a number {low}{high}, not {value!r}")
        return float(value)

    def numbers(self) -> dict[str, float]:
        """Every field as a number above 0."""
        return {key: self.number(key) for key in self.data}

    def fraction(self, key: str, least: float | None = None) -> float:
        """A number above 0, or from `least` on where that is given; at most 1."""
        value = self.number(key, least)
        if value > 1:
            raise UserError(f"{self.where}: {key} must be a fraction of the peak (above 0, at most 1), not {value!r}")
        return value

    def truth(self, key: str) -> bool:
        """True or false."""
        value = self.data[key]
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key} must be true or false, not {value!r}")
        return value

    def integer(self, key: str) -> int:
        """A whole number above 0."""
        value = self.number(key)
        if value != int(value):
            raise UserError(f"{self.where}: {key} must be a whole number, not {value!r}")
        return int(value)

    def items(self, key: str) -> list[Any]:
        """A list with at least one entry."""
        values = self.data[key]
        if not (isinstance(values, list) and values):
            raise UserError(f"{self.where}: {key} must be a list with at least one entry, not {values!r}")
        return values

    def objects(self, key: str, schema: type) -> list[Fields]:
        """A list of objects with the fields of `schema`."""
        return [Fields.of(schema, value, f"{self.where}: {key}[{index}]") for index, value in enumerate(self.items(key))]

    def object(self, key: str, schema: type) -> Fields:
        """An object with the fields of `schema`."""
        return Fields.of(schema, self.data[key], f"{self.where}: {key}")

    def mapping(self, key: str) -> Fields:
        """An object with free keys, at least one."""
        fields = Fields(self.data[key], f"{self.where}: {key}")
        if not fields.data:
            raise UserError(f"{fields.where} must have at least one entry")
        return fields


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
