"""The tables of flags in docs/configuration.md, from the dataclasses that are the flags.

A table stands between `<!-- flags NAME -->` and `<!-- end -->`; NAME is one of `TABLES`. `fill(text)` writes all of them anew.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing

import docs_parsers

from seqloom.trainer import config

TABLE = re.compile(r"(?<=<!-- flags )([^\n]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
TABLES: dict[str, type] = {
    "train.py": config.TrainConfig,
    "compile": config.CompileConfig,
    "optimizer": config.OptimizerConfig,
    "output": config.OutputConfig,
    "evaluation": config.EvalConfig,
    "faults": config.FaultConfig,
    "monitor": config.MonitorConfig,
    "bookcorpus.py": docs_parsers.bookcorpus.Arguments,
    "create_mini_model.py": docs_parsers.create_mini_model.Arguments,
    "ckpt_merger.py": docs_parsers.ckpt_merger.MergerConfig,
    **{name: cls for name, cls in docs_parsers.COMMANDS.items() if name != "compile"},
}


def fill(text: str) -> str:
    """The text of a page with every table made anew."""
    return TABLE.sub(lambda found: f"{found[1]}{found[2]}{table(TABLES[found[1]])}", text)


def table(cls: type) -> str:
    """A row a flag: its name, its default, the choices or the type, and its help."""
    hints, docs = typing.get_type_hints(cls), _docstrings(cls)
    rows = ["| flag | default | what it says |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(hints[field.name]):
            says = " ".join(docs[field.name].split()).replace("|", "\\|")
            rows.append(f"| `--{field.name}` | {_default(field, hints[field.name])} | {says}{_choices(hints[field.name])} |")
    return "\n".join(rows) + "\n"


def _default(field: dataclasses.Field, hint: object) -> str:
    if field.default is dataclasses.MISSING:
        return "needed"
    if field.default is None or field.default == ():
        return ""
    value = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
    return f"`{value}`; `--no_{field.name}`" if field.default is True else "no" if field.default is False else f"`{value}`"


def _choices(hint: object) -> str:
    """The values of a literal type."""
    found = [hint, *typing.get_args(hint)]
    values = next((typing.get_args(each) for each in found if typing.get_origin(each) is typing.Literal), ())
    return f" One of {', '.join(f'`{value}`' for value in values)}." if values else ""


def _docstrings(cls: type) -> dict[str, str]:
    """Field -> the string that stands below it; "" where there is none."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    found = {node.target.id: "" for node in body if isinstance(node, ast.AnnAssign)}
    for node, below in zip(body, body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[node.target.id] = below.value.value
    return found
