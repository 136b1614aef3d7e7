"""A small model of the same architecture, to try a training run with before the large one.

In: a model (folder, name or hub id) and the sizes to shrink. Out: a folder that `AutoModelForCausalLM.from_pretrained` loads. By default
only the number of layers shrinks, and the first layers keep the original's weights where these are on the machine; they are read tensor
by tensor, so the original never has to fit in memory. With other widths the values are drawn as the model draws them.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqloom.capture.architecture import WEIGHT_FILES, resolve_config, weights_folder
from seqloom.data.folders import check_target, staged_folder
from seqloom.data.loader import open_dataset
from seqloom.data.tokenizer import load_tokenizer
from seqloom.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")


@dataclass(frozen=True)
class Sizes:
    """What of a model shrinks. None keeps the original's, or follows a smaller `hidden_size` in proportion."""

    num_layers: int = 4
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None


@dataclass(frozen=True)
class MiniModel:
    """What was made: number of parameters and where their values come from, in words."""

    parameters: int
    origin: str


def shrink(config: PretrainedConfig, sizes: Sizes) -> PretrainedConfig:
    """A copy of a config with some sizes replaced.

    The size of the attention relative to the hidden size stays (so head_dim follows), and so do the ratio of the MLP's width to the
    hidden size and the number of query heads per key/value head, unless given. Raises UserError for sizes that do not fit together.
    """
    for name, value in vars(sizes).items():
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: give a positive number")
    if sizes.num_layers > config.num_hidden_layers:
        raise UserError(f"--num_layers is {sizes.num_layers}, but the model has {config.num_hidden_layers} layers: ask for at most these")
    mini = copy.deepcopy(config)
    mini.num_hidden_layers = sizes.num_layers
    if getattr(config, "layer_types", None):
        mini.layer_types = config.layer_types[: sizes.num_layers]
    _shrink_widths(mini, config, sizes)
    for name in ("vocab_size", "max_position_embeddings"):
        if getattr(sizes, name) is not None:
            _set(mini, name, getattr(sizes, name))
    _drop_missing_tokens(mini)
    return mini


def create_mini_model(
    model_id: str,
    output_id: str,
    sizes: Sizes,
    tokenizer: str | None = None,
    dataset_path: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> MiniModel:
    """Make the mini model of `model_id` in the folder `output_id`, with the tokenizer given or the one of a packed data set.

    A tokenizer also sets the size of the vocabulary, unless `vocab_size` is given or the original's weights are kept and have room
    for it. Raises UserError for a model, tokenizer or size that cannot be used and for a folder that must not be replaced.
    """
    target, source = Path(output_id), weights_folder(model_id)
    if source is not None and source.resolve() == target.expanduser().resolve():
        raise UserError(f"--output_id {output_id} is the folder of the original: choose another one")
    check_target(target, "config.json")
    original = resolve_config(model_id)
    if not (hasattr(original, "num_hidden_layers") and hasattr(original, "vocab_size")):
        raise UserError(
            f"{model_id} cannot shrink: a {original.model_type} config is not that of a plain language model; choose such a one"
        )
    loaded = _tokenizer(tokenizer, dataset_path)
    if loaded is not None:
        sizes = _with_vocab(sizes, len(loaded), original.vocab_size, keep=source is not None)
    config = shrink(original, sizes)
    if loaded is not None:
        _adopt_tokens(config, loaded)
    with staged_folder(target, "config.json", overwrite) as staging:
        model = _random_model(config, model_id, seed)
        origin = _fill(model, original, source, seed)
        model.save_pretrained(staging)
        if loaded is not None:
            loaded.save_pretrained(staging)
    return MiniModel(sum(parameter.numel() for parameter in model.parameters()), origin)


def _shrink_widths(mini: PretrainedConfig, config: PretrainedConfig, sizes: Sizes) -> None:
    hidden = sizes.hidden_size or config.hidden_size
    heads = sizes.num_attention_heads or config.num_attention_heads
    _set(mini, "hidden_size", hidden)
    _set(mini, "num_attention_heads", heads)
    head_dim, rest = hidden // heads, hidden % heads
    if getattr(config, "head_dim", None) is not None:
        head_dim, rest = divmod(hidden * config.head_dim * config.num_attention_heads, config.hidden_size * heads)
        mini.head_dim = head_dim
    if rest or head_dim % 2:
        raise UserError(
            f"a hidden size of {hidden} and {heads} heads give no even head size: choose --hidden_size and --num_attention_heads"
        )
    if getattr(config, "num_key_value_heads", None) is not None or sizes.num_key_value_heads is not None:
        kv_heads = sizes.num_key_value_heads or max(1, heads * config.num_key_value_heads // config.num_attention_heads)
        if heads % kv_heads:
            raise UserError(f"{heads} heads do not share {kv_heads} key/value heads evenly: choose --num_key_value_heads to divide them")
        _set(mini, "num_key_value_heads", kv_heads)
    if sizes.intermediate_size is not None:
        _set(mini, "intermediate_size", sizes.intermediate_size)
    elif hidden != config.hidden_size and getattr(config, "intermediate_size", None) is not None:
        mini.intermediate_size = max(1, config.intermediate_size * hidden // config.hidden_size)


def _set(config: PretrainedConfig, name: str, value: int) -> None:
    if not hasattr(config, name):
        raise UserError(f"a {config.model_type} config has no {name}: leave --{name} out")
    setattr(config, name, value)


def _drop_missing_tokens(config: PretrainedConfig) -> None:
    """Special tokens that a smaller vocabulary no longer has become None, so that generation does not wait for them."""
    for name in TOKEN_IDS:
        ids = getattr(config, name, None)
        if ids is not None and max(ids if isinstance(ids, list) else [ids]) >= config.vocab_size:
            setattr(config, name, None)


def _tokenizer(name: str | None, dataset_path: str | None) -> PreTrainedTokenizerBase | None:
    if name is not None and dataset_path is not None:
        raise UserError("--tokenizer and --dataset_path both give a tokenizer: give one of them")
    if dataset_path is not None:
        return load_tokenizer(str(open_dataset(dataset_path).tokenizer_path))
    return None if name is None else load_tokenizer(name)


def _with_vocab(sizes: Sizes, needed: int, original: int, keep: bool) -> Sizes:
    """The sizes with a vocabulary that has room for `needed` tokens."""
    if sizes.vocab_size is None:
        return sizes if keep and needed <= original else Sizes(**{**vars(sizes), "vocab_size": needed})
    if sizes.vocab_size < needed:
        raise UserError(f"--vocab_size is {sizes.vocab_size}, but the tokenizer has {needed} tokens: give at least these")
    return sizes


def _adopt_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """The special tokens of the model are the tokenizer's.

    A padding token that is also the end of text stays out: the embedding of a model's `pad_token_id` gets no gradient.
    """
    for name in TOKEN_IDS:
        setattr(config, name, getattr(tokenizer, name))
    if config.pad_token_id == config.eos_token_id:
        config.pad_token_id = None


def _random_model(config: PretrainedConfig, model_id: str, seed: int) -> PreTrainedModel:
    """The model with its own initial values, the same ones for the same seed, in the dtype of its config."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32, trust_remote_code=False)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"no causal language model can be made from the config of {model_id}: {reason}") from error


def _fill(model: PreTrainedModel, original: PretrainedConfig, source: Path | None, seed: int) -> str:
    """Give the model the weights in `source` if it has the widths of the original; says in words which values it has."""
    changed = [name for name in WIDTHS if getattr(model.config, name, None) != getattr(original, name, None)]
    if source is not None and not changed:
        return _copy_weights(model, source)
    reason = f"; the weights of {source} do not fit another {', '.join(changed)}" if source is not None else ""
    return f"random values, as the model draws them (seed {seed}{reason})"


def _copy_weights(model: PreTrainedModel, folder: Path) -> str:
    """Fill the model from the safetensors files of a folder, one tensor in memory at a time; says what was done."""
    import torch
    from safetensors import safe_open

    index = _tensor_files(folder)
    files: dict[Path, Any] = {}
    plan = []
    for name, parameter in model.named_parameters():
        key = next((key for key in _stored_names(name, model.base_model_prefix) if key in index), None)
        if key is None:
            raise UserError(
                f"the weights in {folder} have no {name}: complete the folder, or use a name in configs/models for random values"
            )
        if index[key] not in files:
            files[index[key]] = safe_open(index[key], framework="pt")
        shape = tuple(files[index[key]].get_slice(key).get_shape())
        if shape != tuple(parameter.shape):
            raise UserError(
                f"{name} is {list(shape)} in {folder}, but {list(parameter.shape)} by the config: change the sizes or the folder"
            )
        plan.append((parameter, files[index[key]], key))
    with torch.no_grad():
        for parameter, file, key in plan:
            parameter.copy_(file.get_tensor(key))
    return f"the weights of {folder}, its first {model.config.num_hidden_layers} layers"


def _stored_names(name: str, prefix: str) -> tuple[str, str]:
    """Under which keys a parameter may be stored: its own name, or that of the base model saved alone."""
    return name, name.removeprefix(f"{prefix}.")


def _tensor_files(folder: Path) -> dict[str, Path]:
    """State-dict key -> safetensors file. Raises UserError if a file of the index is missing."""
    from safetensors import safe_open

    index = folder / WEIGHT_FILES[0]
    if not index.is_file():
        single = folder / WEIGHT_FILES[1]
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise UserError(f"the weights in {folder} are not complete: {name} is missing")
    return {key: folder / name for key, name in weight_map.items()}
