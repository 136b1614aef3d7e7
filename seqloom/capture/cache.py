"""A small store of JSON documents, by everything they were made from: what has been worked out once is not worked out again.

In: a folder, a kind of document (`capture`), a key (a JSON document). A file `<kind>-<digest of the key>.json` holds the key, the content
and the sha256 of both, so that a damaged file is noticed and never believed. The store may be deleted at any time, and a file that
cannot be read or written costs time only: the log says so in one line. Of each kind the files used last are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEEP = 8  # files of each kind

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cache:
    """A store in `folder`, which is made when the first document is written."""

    folder: Path

    def path(self, kind: str, key: Mapping[str, Any]) -> Path:
        """The file of a key."""
        return self.folder / f"{kind}-{_digest(json.dumps(key, sort_keys=True))}.json"

    def load(self, kind: str, key: Mapping[str, Any]) -> Any:
        """The content saved under `key`, None where there is none or it cannot be believed."""
        path = self.path(kind, key)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if _sealed(document["key"], document["content"]) != document or document["key"] != json.loads(json.dumps(key)):
                raise ValueError("it does not hold what was written")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            self.reject(kind, key, error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: pruned last
        return document["content"]

    def reject(self, kind: str, key: Mapping[str, Any], error: Exception) -> None:
        """Say that the content of a key cannot be used, and that it is made anew."""
        _log.warning("the cached %s %s cannot be used (%s: %s): it is made anew", kind, self.path(kind, key), type(error).__name__, error)

    def save(self, kind: str, key: Mapping[str, Any], content: Any) -> None:
        """Keep `content`, whole or not at all, and remove the files of this kind that were not used for longest."""
        path = self.path(kind, key)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(_sealed(key, content)) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            _log.warning("the %s is not kept for the next compile: %s cannot be written (%s)", kind, path, error.strerror)
            return
        self._prune(kind)

    def _prune(self, kind: str) -> None:
        """Parts that a killed process left behind grow old and go the same way."""
        with contextlib.suppress(OSError):  # another compile may prune at the same time
            files = sorted(self.folder.glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for path in files[KEEP:]:
                path.unlink()


def _sealed(key: Any, content: Any) -> dict[str, Any]:
    return {"sha256": _digest(json.dumps([key, content])), "key": key, "content": content}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
