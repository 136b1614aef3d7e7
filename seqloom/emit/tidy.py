"""Finishing touches on a method's source: short names, direct returns, comments that fit.

In and out: source lines `targets = expression  # comment`. Renaming follows liveness: `hidden_states_1` becomes `hidden_states` from the
line that makes it, when nothing afterwards still needs the older value of that name.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping, Sequence

_IDENTIFIER = re.compile(r"(?<![\w.])([A-Za-z_]\w*)(?!\w*\s*=[^=])")
_TARGETS = re.compile(r"^([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*) = (.*)$", re.DOTALL)
_COUNTED = re.compile(r"^(.*?)_\d+$")
COMMENT = "  # "


def tidy(arguments: Sequence[str], lines: Sequence[str], returned: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments, lines with the return) of a method, with counters dropped from names where that is safe."""
    names = dict.fromkeys(arguments)
    mapping: dict[str, str] = {}
    for name in arguments:
        base = _base(name)
        assigned = any(base in _split(line)[0] for line in lines)
        unused = base not in names and base not in mapping.values() and not assigned and not _used(base, [*lines, *returned], {})
        if base != name and unused and _free(base, lines):
            mapping[name] = base
    final = [mapping.get(name, name) for name in arguments]
    done = []
    for index, line in enumerate(lines):
        code, mark, comment = line.partition(COMMENT)
        targets, expression = _split(code)
        expression = _renamed(expression, mapping)
        rest = [other.partition(COMMENT)[0] for other in lines[index + 1 :]] + list(returned)
        for target in targets:
            base = _base(target)
            mapping.pop(target, None)
            taken = base in targets or any(base in _split(other)[0] for other in rest)
            if base != target and not taken and _free(base, lines) and not _used(base, rest, mapping):
                mapping[target] = base
        code = f"{', '.join(mapping.get(t, t) for t in targets)} = {expression}" if targets else expression
        done.append(code + mark + comment)
    return final, with_return(done, [mapping.get(name, name) for name in returned])


def _base(name: str) -> str:
    match = _COUNTED.match(name)
    return match[1] if match else name


def _free(name: str, lines: Sequence[str]) -> bool:
    """Whether a variable may have this name: no keyword, and no function that the method calls."""
    return not keyword.iskeyword(name) and not any(re.search(rf"(?<![\w.]){name}\(", line) for line in lines)


def _split(code: str) -> tuple[list[str], str]:
    match = _TARGETS.match(code)
    return (match[1].split(", "), match[2]) if match else ([], code)


def _renamed(code: str, mapping: Mapping[str, str]) -> str:
    return _IDENTIFIER.sub(lambda match: mapping.get(match[1], match[1]), code)


def _used(name: str, lines: Sequence[str], mapping: Mapping[str, str]) -> bool:
    """Whether `name` is read in any of the lines, directly or as what another name now maps to."""
    return any(mapping.get(found, found) == name for line in lines for found in _IDENTIFIER.findall(_split(line)[1]))


def with_return(lines: list[str], returned: Sequence[str]) -> list[str]:
    """Return the last expression itself where it is all that is returned."""
    if lines and len(returned) == 1:
        code, mark, comment = lines[-1].partition(COMMENT)
        targets, expression = _split(code)
        if targets == list(returned):
            return [*lines[:-1], f"return {expression}{mark}{comment}"]
    return [*lines, f"return {', '.join(returned)}"]


def fit(lines: Sequence[str], indent: int, width: int) -> list[str]:
    """Indented lines; a comment that would make its line too long goes on the line above."""
    fitted = []
    for line in lines:
        text = " " * indent + line
        code, mark, comment = text.partition(COMMENT)
        if mark and len(text) > width:
            own = len(code) - len(code.lstrip())
            fitted += [f"{' ' * own}# {comment}", code]
        else:
            fitted.append(text)
    return fitted
