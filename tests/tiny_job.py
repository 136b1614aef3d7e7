"""A model and a data set small enough to train in seconds, and the flags of a run on them."""

import json

import numpy as np
from datasets import Dataset
from transformers import LlamaConfig

from seqloom.data.metadata import Metadata, write_metadata
from seqloom.report.run_log import LOG
from seqloom.trainer.config import TrainConfig, parse

VOCAB, LENGTH, ROWS = 96, 16, 24


def make_model(folder, **changes):
    """A config without weights."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    LlamaConfig(architectures=["LlamaForCausalLM"], **{**sizes, **changes}).save_pretrained(folder)
    return folder


def make_dataset(folder, rows=ROWS, length=LENGTH, highest=VOCAB - 1, seed=0):
    """Rows with a pattern that can be learned; the last label of the last rows does not count."""
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, 90, size=(rows, 1))
    tokens = (starts + 3 * np.arange(length + 1)) % 90
    tokens[-1, length // 2] = highest
    labels = tokens[:, 1:].copy()
    labels[rows // 2 :, -1] = -100
    table = Dataset.from_dict({"input_ids": tokens[:, :-1].astype(np.int32), "labels": labels.astype(np.int32)})
    table.save_to_disk(str(folder))
    write_metadata(folder, Metadata(length, VOCAB, "made up", "0" * 64, "made up", "0" * 64, rows, rows * length, rows))
    return folder


def make_job(folder):
    """Model and data set in a folder."""
    make_model(folder / "model")
    make_dataset(folder / "data")
    return folder


def flags(folder, **changes):
    """The flags of a run whose files all lie in `folder`; a value of None leaves a flag out, True gives it alone."""
    chosen = {
        "model_id": folder / "model",
        "dataset_path": folder / "data",
        "hardware": "cpu",
        "precision": "fp32",
        "grad_accumulation_steps": 2,
        "lr": 1e-2,
        "output_folder": folder / "programs",
        "checkpoint_dir": folder / "checkpoints",
        "log_dir": folder / "runs",
        **changes,
    }
    words = []
    for name, value in chosen.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def config(folder, **changes):
    """The parsed config of such a run."""
    return parse(TrainConfig, "train.py", flags(folder, **changes))


def read_log(folder):
    """The records of a run by step, each step once; damaged lines, skipped steps, evaluations and events do not count."""
    records = {}
    for line in (folder / LOG).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "loss" in record or "skipped" in record:
            records[record["step"]] = record
    return [records[step] for step in sorted(records) if "loss" in records[step]]
