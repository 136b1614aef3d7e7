"""What a run's folder holds: `run.json`, which says what the run is, and the log of what it did.

In: `runs/<name>/`. Out: `RunDocuments`. Every field of `run.json` may be absent, and so may either file, but not both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqloom.errors import UserError
from seqloom.report.run_log import LOG, LoggedRun, LogReader, known_number

RUN = "run.json"


@dataclass(frozen=True)
class RunDocuments:
    """A run: its folder, its name, `run.json` and the log."""

    folder: Path
    name: str
    info: Mapping[str, Any]
    log: LoggedRun

    @property
    def plan(self) -> Mapping[str, Any]:
        """What was predicted; empty where nothing was."""
        return table(self.info, "plan")

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run."""
        total = value(self.info, "total_steps")
        return int(total) if total and total > 0 else None

    @property
    def on_cpu(self) -> bool:
        """Whether it runs without a GPU: then the memory in the log is the whole process's, and no prediction can be held against it."""
        return (text(self.info, "device") or text(self.plan, "hardware") or "").startswith("cpu")

    @property
    def predicted_memory_gib(self) -> float | None:
        """The predicted peak of the fullest rank, where it can be compared with the log."""
        return None if self.on_cpu else value(table(self.plan, "peak_memory_gib"), "total")

    @property
    def plan_page(self) -> str | None:
        """Where the plan's page is, as seen from the run's folder."""
        page = text(self.info, "plan_page")
        return os.path.relpath(page, self.folder) if page and os.path.isabs(page) else page


def read_run(folder: Path, reader: LogReader | None = None) -> RunDocuments:
    """The run in `folder`; `reader` is one of this folder that has read the beginning of its log already.

    Raises `UserError` where the folder is no run's, or `run.json` is damaged.
    """
    if not (folder / RUN).is_file() and not (folder / LOG).is_file():
        raise UserError(f"{folder} holds no run, neither {RUN} nor {LOG}: give a folder that training wrote, such as runs/default")
    folder = folder.resolve()
    info = _read(folder / RUN)
    return RunDocuments(folder, text(info, "name") or folder.name, info, (reader or LogReader(folder)).read())


def value(document: Mapping[str, Any], key: str) -> float | None:
    """The number under a key; None for anything else."""
    return known_number(document.get(key))


def text(document: Mapping[str, Any], key: str) -> str | None:
    """The text under a key; None where there is none."""
    found = document.get(key)
    return found if isinstance(found, str) and found else None


def table(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under a key; empty where there is none."""
    found = document.get(key)
    return found if isinstance(found, dict) else {}


def settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The leaves of a tree of settings by their dotted names, as text."""
    flat = {}
    for key, found in config.items():
        name = f"{prefix}{key}"
        if isinstance(found, dict) and found:
            flat |= settings(found, f"{name}.")
        else:
            flat[name] = found if isinstance(found, str) else json.dumps(found)
    return flat


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it to see the log alone, or start the run again") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a JSON object: remove it to see the log alone, or start the run again")
    return document
