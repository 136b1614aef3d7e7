"""Which model: from what the user wrote after `--model_id` to a Hugging Face config, without reading any weight.

In: a local folder with `config.json`, the name of a file in `configs/models/`, or a hub id, tried in this order. Out: a
`PretrainedConfig`. Compiling needs nothing else. Code from a model repository is never run.

A file in `configs/models/` is the published `config.json` of a model plus `_hub_ids`: the hub ids it stands for, each with the
fields in which that repository differs. So the models people use most compile without a network.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqloom.data.hub import hub_clients
from seqloom.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)
MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
CONFIG = "config.json"
HUB_IDS = "_hub_ids"
WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors")


@dataclass(frozen=True)
class ConfigSource:
    """Where the config of a model was found: the `fields` of a file in `configs/models/`, or a folder or hub id that transformers reads.

    `file` is the `config.json` of that folder or of the hub's local cache; None where it must be fetched.
    """

    model_id: str
    fields: Mapping[str, Any] | None = None
    file: Path | None = None

    @property
    def published(self) -> bool:
        """Whether the config comes from `configs/models/`."""
        return self.fields is not None

    def written(self) -> dict[str, Any] | None:
        """The fields as they are written, where these alone decide the config; None where transformers must look at more, or complains."""
        if self.fields is not None:
            return dict(self.fields)
        try:
            fields = json.loads(self.file.read_text(encoding="utf-8")) if self.file is not None else None
        except (OSError, ValueError):
            return None
        return fields if isinstance(fields, dict) and "model_type" in fields and "auto_map" not in fields else None

    def resolve(self) -> PretrainedConfig:
        """The config. Raises UserError for one that cannot be read, or an architecture transformers does not know."""
        if self.fields is not None:
            return config_of(self.fields)
        folder = Path(self.model_id).expanduser()
        return _from_pretrained(folder if self.file == folder / CONFIG else self.model_id, local_only=self.file is not None)


def resolve_config(model_id: str) -> PretrainedConfig:
    """The config of a model: a local folder, a name in `configs/models/`, or a hub id, whichever is found first.

    Raises UserError for a folder without `config.json`, an unknown name, an architecture transformers does not know.
    """
    return find_config(model_id).resolve()


def find_config(model_id: str) -> ConfigSource:
    """Where the config of a model is: a local folder, a name in `configs/models/`, or a hub id, whichever is found first.

    A hub id is looked up in the local cache, then among the hub ids of `configs/models/` (said in the log), then on the hub.
    Raises UserError for a folder without `config.json` and for an unknown name.
    """
    folder = Path(model_id).expanduser()
    if (folder / CONFIG).is_file():
        return ConfigSource(model_id, file=folder / CONFIG)
    if model_id in architecture_names():
        return ConfigSource(model_id, _published(model_id))
    if folder.is_dir():
        raise UserError(f"the model folder {model_id} has no config.json: point --model_id at a folder written by save_pretrained")
    if not _looks_like_hub_id(model_id):
        raise UserError(f"there is no model {model_id}: it is neither a folder nor a name in configs/models ({_nearest(model_id)})")
    return _on_hub(model_id)


def architecture_names() -> tuple[str, ...]:
    """Names that `--model_id` takes from `configs/models/`, sorted."""
    return tuple(sorted(_architectures()))


def weights_folder(model_id: str) -> Path | None:
    """The local folder with the safetensors weights of a model, or None; a hub id is looked up in the local cache, never fetched."""
    folder = Path(model_id).expanduser()
    if any((folder / name).is_file() for name in WEIGHT_FILES):
        return folder
    if folder.exists() or not _looks_like_hub_id(model_id):
        return None
    from huggingface_hub import try_to_load_from_cache

    for name in WEIGHT_FILES:
        cached = try_to_load_from_cache(model_id, name)
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def has_weights(model_id: str) -> bool:
    """Whether the weights of a model are on this machine (`weights_folder`)."""
    return weights_folder(model_id) is not None


@cache
def _architectures() -> dict[str, str]:
    """Name -> JSON text of every file in `configs/models/`, which is installed beside this package."""
    return {file.stem: file.read_text(encoding="utf-8") for file in MODELS.glob("*.json")}


def _published(name: str) -> dict[str, Any]:
    return json.loads(_architectures()[name])


def _known_hub_ids() -> dict[str, tuple[str, dict[str, Any]]]:
    """Hub id -> (name in `configs/models/`, the fields in which that repository differs)."""
    return {hub_id: (name, changes) for name in architecture_names() for hub_id, changes in _published(name)[HUB_IDS].items()}


def config_of(fields: Mapping[str, Any]) -> PretrainedConfig:
    """The config of the fields of a `config.json`."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**{key: value for key, value in fields.items() if key != HUB_IDS})


def _on_hub(hub_id: str) -> ConfigSource:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, CONFIG)
    if isinstance(cached, str):
        return ConfigSource(hub_id, file=Path(cached))
    known = _known_hub_ids().get(hub_id)
    if known is None:
        return ConfigSource(hub_id)
    name, changes = known
    logger.warning("%s: using its published config from configs/models/%s.json (nothing is fetched)", hub_id, name)
    return ConfigSource(hub_id, {**_published(name), **changes})


def _from_pretrained(source: str | Path, local_only: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        with hub_clients(local_only):
            return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise UserError(
            f"cannot read the config of {source} ({_first_sentence(error)}): "
            f"give a local folder with config.json or a name in configs/models ({_nearest(str(source))})"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the config of {source} does not describe a model transformers knows: {_first_sentence(error)}") from error


def _looks_like_hub_id(model_id: str) -> bool:
    """`name/model`, as opposed to a path or a bare word."""
    return model_id.count("/") == 1 and not model_id.startswith((".", "/", "~")) and not model_id.endswith("/")


def _nearest(model_id: str) -> str:
    """The names a user may have meant, or all of them."""
    wanted = model_id.rsplit("/", maxsplit=1)[-1].lower().replace("-", "_").replace(".", "_")
    close = difflib.get_close_matches(wanted, architecture_names(), n=3, cutoff=0.5)
    return f"nearest: {', '.join(close)}" if close else f"there are {', '.join(architecture_names())}"


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
