"""Config and capture for the next compile: a change of a flag that capture does not depend on costs neither of them again.

In: a model id and what `capture` takes. Out: what `resolve_config` and `capture` give, from the cache where everything that they depend on
is the same: the model's config and code, the shapes, the loss, the versions of Python, PyTorch and transformers, the sources of capture, of
the operators' rules and of the registered operators. Where the config is known too, transformers (3 s of imports) is not imported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seqloom.capture.architecture import find_config
from seqloom.capture.cache import Cache
from seqloom.capture.graph_json import captured_from_json, captured_to_json
from seqloom.capture.model_source import model_source_digest
from seqloom.capture.pipeline import Captured, capture
from seqloom.graph import Graph, GraphError
from seqloom.ops.registry import resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = ("capture/*.py", "ops/*.py", "graph.py", "annotation.py", "grammar.py")  # what decides how a model is captured
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")  # where a config lay and who wrote it

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelConfig:
    """The config of a model: `fields` are all of its settings as JSON, `pretrained` the object, None where nobody asked for it yet."""

    model_id: str
    fields: Mapping[str, Any]
    pretrained: PretrainedConfig | None

    def to_dict(self) -> dict[str, Any]:
        """The settings, like those of a `PretrainedConfig`."""
        return dict(self.fields)

    def resolve(self) -> PretrainedConfig:
        """The object. Raises `UserError` as `resolve_config` does."""
        return self.pretrained if self.pretrained is not None else find_config(self.model_id).resolve()


def read_config(model_id: str, store: Cache) -> ModelConfig:
    """The config of a model, without transformers where it is in the cache. Raises `UserError` as `resolve_config` does."""
    found = find_config(model_id)
    # Where transformers is imported anyway there is nothing to save, and classes may have been registered with it.
    written = None if "transformers" in sys.modules else found.written()
    key = {"written": written, "published": found.published, **_versions()}
    fields = None if written is None else store.load("config", key)
    if fields is not None:
        return ModelConfig(model_id, fields, None)
    config = found.resolve()
    fields = config_fields(config)
    if written is not None:
        store.save("config", key, fields)
    return ModelConfig(model_id, fields, config)


def config_fields(config: PretrainedConfig) -> dict[str, Any]:
    """All settings of a config as JSON holds them, but for those that do not describe the model."""
    fields = {name: value for name, value in config.to_dict().items() if name not in _NOT_THE_MODEL}
    return json.loads(json.dumps(fields, default=str))


def cached_capture(
    store: Cache, config: ModelConfig, *, batch_size: int, seq_len: int, dtype: torch.dtype, loss: str, loss_chunk: int
) -> Captured:
    """What `capture` gives for these arguments, equal in every field, whether it comes from the cache or is made now and kept.

    Raises `UserError` as `capture` does.
    """
    asked = {"batch_size": batch_size, "seq_len": seq_len, "loss": loss, "loss_chunk": loss_chunk}
    key = {"config": dict(config.fields), **asked, "dtype": str(dtype).removeprefix("torch."), **_versions()}
    key["model"] = model_source_digest(str(config.fields.get("model_type", "")))
    if config.pretrained is not None and _has_code_of_its_own(config.pretrained):
        return capture(config.pretrained, dtype=dtype, **asked)
    captured = _load(store, key)
    if captured is None:
        captured = capture(config.resolve(), dtype=dtype, **asked)
        try:
            document = captured_to_json(captured)
        except GraphError as error:
            _log.warning("the capture of %s is not kept for the next compile: %s", captured.model_class, error)
            return captured
        store.save("capture", key, {"operators": _digests(captured.graph), "captured": document})
    return captured


def _load(store: Cache, key: Mapping[str, Any]) -> Captured | None:
    """The capture of a key, None where there is none or a registered operator in it has changed since.

    Raises `UserError` for an operator that is gone: `capture` would not find it either.
    """
    content = store.load("capture", key)
    if content is None:
        return None
    try:
        captured = captured_from_json(content["captured"])
        return captured if _digests(captured.graph) == content["operators"] else None
    except (GraphError, KeyError, TypeError, ValueError, AttributeError) as error:
        store.reject("capture", key, error)
        return None


def registered_operators(graph: Graph) -> list[str]:
    """Names of the registered functions that a graph calls, sorted."""
    graphs = [graph, *graph.blocks.values()]
    return sorted({node.op for part in graphs for node in part.nodes if ":" in node.op and not node.is_block})


def _digests(graph: Graph) -> dict[str, str]:
    return {name: resolve(name).source_digest for name in registered_operators(graph)}


def _has_code_of_its_own(config: PretrainedConfig) -> bool:
    """Whether the model's code lies outside transformers, whose version would not tell of a change in it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = type(config)
    if not kind.__module__.startswith("transformers."):
        return True
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and not MODEL_FOR_CAUSAL_LM_MAPPING[kind].__module__.startswith("transformers.")


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "sources": _source_digest(),
    }


@cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in PACKAGE.glob(pattern)):
        digest.update(f"{path.relative_to(PACKAGE)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
