"""A strict reader of the pages that the report writes: every element closed in its place, and what the elements are."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

from seqloom.report.markup import VOID


@dataclass
class Element:
    """An element with its attributes, the text in it (children's too) and its ancestors' names, outermost first."""

    name: str
    attributes: dict[str, str | None]
    ancestors: tuple[str, ...]
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())

    @property
    def classes(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())


class Page(HTMLParser):
    """`Page(text).elements`: every element in order. Raises AssertionError where the text is not well-formed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.declarations: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {[element.name for element in self.open]}"

    def handle_decl(self, decl: str) -> None:
        self.declarations.append(decl)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute of <{tag}> twice: {attrs}"
        element = Element(tag, dict(attrs), tuple(outer.name for outer in self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1].name == tag, f"</{tag}> in {[element.name for element in self.open]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.parts.append(data)

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration in the text: {data}")

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment in the text: {data}")

    def all(self, name: str) -> list[Element]:
        return [element for element in self.elements if element.name == name]

    def section(self, id_: str) -> Element | None:
        return next((element for element in self.all("section") if element.attributes.get("id") == id_), None)

    @property
    def section_ids(self) -> list[str]:
        return [element.attributes["id"] for element in self.all("section")]

    @property
    def text(self) -> str:
        """What is read: everything in the body but the script."""
        body, script = self.all("body")[0], self.all("script")[0]
        return body.text.replace(script.text, "")
