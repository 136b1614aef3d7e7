"""HTML and SVG as text that cannot be broken by what it shows: every string that is not markup already is escaped.

Role in the pipeline: under every figure of the report. In: names, attributes, children. Out: `Markup`.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TypeAlias

VOID = frozenset({"meta", "link", "br", "hr", "col", "input"})


class Markup(str):
    """Text that is HTML or SVG already."""

    __slots__ = ()


Child: TypeAlias = "str | Markup | None | Iterable[Child]"
Attribute: TypeAlias = "str | int | float | bool | None"


def tag(name: str, *children: Child, **attributes: Attribute) -> Markup:
    """An element: `tag("p", "1 < 2", class_="note")` is `<p class="note">1 &lt; 2</p>`.

    Strings are escaped, `Markup` is taken as it is, None is left out, other iterables are flattened. In attribute names a last underscore
    is dropped and the others become hyphens; None and False leave the attribute out, True writes it bare.
    """
    opening = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>"
    return Markup(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Children one after the other."""
    return Markup("".join(_text(child) for child in children))


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    return escape(child, quote=False) if isinstance(child, str) else join(child)


def _attribute(key: str, value: Attribute) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(_value(value))}"'


def _value(value: str | int | float) -> str:
    """Numbers with two decimals at most: a hundredth of a pixel is not seen."""
    return (f"{value:.2f}".rstrip("0").rstrip(".") or "0") if isinstance(value, float) else str(value)
