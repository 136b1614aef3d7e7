"""What a model's code is, so that an edit of it is noticed: the files of transformers that define it, and what was put in their place.

Role in the pipeline: part of the key of the capture cache and of a program's fingerprint, beside the version of transformers. That stays
the same when somebody edits an installed file or assigns `LlamaMLP.forward = ...`. In: the model's type. Out: a digest. transformers is
not imported for it: functions can only have been replaced where it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

SHARED = ("activations.py", "masking_utils.py", "modeling_rope_utils.py", "modeling_layers.py", "integrations/sdpa_attention.py")


def model_source_digest(model_type: str) -> str:
    """SHA-256 of the code that transformers has for a type of model (`llama`), with functions that were replaced in this process."""
    folder = model_type.replace("-", "_")
    digest = hashlib.sha256(_files_digest(folder).encode())
    for name, code in sorted(_replaced(folder)):
        digest.update(f"{name}\0{_code_digest(code)}\n".encode())
    return digest.hexdigest()


@cache
def _package() -> Path | None:
    spec = importlib.util.find_spec("transformers")
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


@cache
def _files_digest(folder: str) -> str:
    root, digest = _package(), hashlib.sha256()
    if root is not None:
        for path in (*sorted((root / "models" / folder).glob("*.py")), *(root / name for name in SHARED)):
            if path.is_file():
                digest.update(f"{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _replaced(folder: str) -> Iterator[tuple[str, CodeType]]:
    """Functions of the model's modules whose code lies outside transformers and PyTorch, with their names."""
    for name, module in list(sys.modules.items()):
        if name.startswith(f"transformers.models.{folder}.modeling") and isinstance(module, ModuleType):
            for owner in (module, *(value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == name)):
                yield from _foreign_functions(owner)


def _foreign_functions(owner: Any) -> Iterator[tuple[str, CodeType]]:
    for name, value in list(vars(owner).items()):
        function = inspect.unwrap(value) if callable(value) and not inspect.isclass(value) else value
        if isinstance(function, FunctionType) and not _is_known(function.__module__):
            yield f"{owner.__name__}.{name}", function.__code__


def _is_known(module: str | None) -> bool:
    """Whether a module belongs to a package that a version stands for."""
    root = (module or "").partition(".")[0]
    return root in ("transformers", "torch") or root in sys.stdlib_module_names


def _code_digest(code: CodeType) -> str:
    """What a function does, wherever it lies: its instructions, names and constants."""
    parts: list[Any] = [code.co_code, code.co_names, code.co_varnames, code.co_freevars]
    parts += [_code_digest(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
