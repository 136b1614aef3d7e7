"""What a program was compiled from, field by field, so that a stale program is refused with the field that differs.

`fingerprint.json` holds the request, the model's config, digests of the model's code and of every registered operator's source, and the
versions of torch, transformers and seqloom.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import seqloom
from seqloom.capture.model_source import model_source_digest
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.ops.registry import resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FILE = "fingerprint.json"
_NOT_COMPARED = ("model_id", "name", "output_folder")
_VOLATILE_CONFIG = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "_attn_implementation", "_attn_implementation_autoset")


def fingerprint(request: CompileRequest, config: PretrainedConfig, operators: Sequence[str]) -> dict[str, Any]:
    """Everything that decides the program; `operators` are the names of the registered functions that it calls."""
    asked = {k: v for k, v in dataclasses.asdict(request).items() if k not in _NOT_COMPARED}
    asked["documents"] = bool(request.documents)  # their lengths shape the plan, and any others run under it
    settings = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE_CONFIG}
    return {
        "request": asked,
        "config": json.loads(json.dumps(settings, sort_keys=True, default=str)),
        "operators": {name: resolve(name).source_digest for name in sorted(operators)},
        "source": {"model": model_source_digest(str(settings.get("model_type", "")))},
        "versions": {"torch": torch.__version__, "transformers": version("transformers"), "seqloom": seqloom.__version__},
    }


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first field in which two fingerprints differ, as words; None when they agree."""
    titles = {
        "request": "",
        "config": "model config ",
        "operators": "the source of operator ",
        "source": "the source of the ",
        "versions": "the version of ",
    }
    for part, title in titles.items():
        before, now = old.get(part, {}), new.get(part, {})
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                if part in ("operators", "source"):
                    return f"{title}{key} has changed"
                return f"{title}{key} was {before.get(key)} and is now {now.get(key)}"
    return None


def read(folder: Path) -> dict[str, Any] | None:
    """The fingerprint of a compiled program, None where there is none. Raises `UserError` for one that is not readable."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not readable ({error}): delete the folder {folder} and compile again") from error
