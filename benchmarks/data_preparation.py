"""Preparing a data set end to end, beside what `datasets.map` with the same tokenizer takes for its tokens alone.

    python benchmarks/data_preparation.py            # a table
    python benchmarks/data_preparation.py --write    # and kept in benchmarks/results/data_preparation.json

The corpus is `stdlib`, the sources of the running Python's standard library, with a byte-level BPE of `VOCAB` tokens trained on it.
`prepare`: seconds from the name of the corpus to the finished folder (read, check sums, tokenize, pack rows of `SEQ_LEN` tokens, write, and
the tokenizer saved), without the training of the tokenizer, which is timed by itself. `map`: seconds of `datasets.map` over the corpus
that was read before, batched as it is by default, its result in a file of the same kind. Both alternate; figures are medians of `REPEATS`.
`processes`: the same as `prepare` with `--num_proc` of all cores instead of one process whose tokenizer uses all cores. Seconds of all
cores' work stand beside seconds of the clock: they say the same on a machine that is busy with something else.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import tokenizers
from jobs import keep, machine
from transformers import PreTrainedTokenizerBase

from seqloom.data.build import build
from seqloom.data.corpora import Corpus, load_corpus
from seqloom.data.settings import Settings
from seqloom.data.tokenizer import load_tokenizer, train_tokenizer

REPEATS = 3
VOCAB, SEQ_LEN = 4096, 4096


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the figures in results/data_preparation.json")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write: choose the disk to measure")
    args = parser.parse_args()
    where = machine()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="seqloom-data-", dir=args.folder) as folder:
        found = measure(Path(folder))
    print(f"corpus                 {found['megabytes']:.1f} MB, {found['documents']:,} documents, {found['tokens']:,} tokens")
    print(f"train the tokenizer    {found['train_s']:6.1f} s")
    for name, words in (("prepare", "prepare"), ("processes", "prepare, processes"), ("map", "map alone")):
        print(f"{words:22} {found[f'{name}_s']:6.1f} s {found[f'{name}_cpu_s']:6.1f} s of cores' work")
    print(f"ratio                  {found['ratio']:6.2f}   {found['cpu_ratio']:6.2f}   prepare / map")
    print(f"with the tokenizer     {found['total_s']:6.1f} s from nothing to the finished data set")
    if args.write:
        versions = {"datasets": datasets.__version__, "tokenizers": tokenizers.__version__, "python": platform.python_version()}
        content = {"machine": where, **versions, "repeats": REPEATS, "vocab": VOCAB, "seq_len": SEQ_LEN, **found}
        keep("data_preparation", content)


def measure(folder: Path) -> dict[str, Any]:
    """Seconds of each way, and what was prepared."""
    corpus = load_corpus("stdlib")
    (train_s, _), tokenizer = timed(lambda: train_tokenizer([corpus], VOCAB))
    trained = folder / "tokenizer"
    tokenizer.save_pretrained(trained)
    seconds: dict[str, list[tuple[float, float]]] = {"prepare": [], "map": [], "processes": []}
    for repeat in range(REPEATS):
        target = folder / str(repeat)
        target.mkdir()
        took, metadata = timed(lambda to=target / "set": prepare(trained, to, None))
        seconds["prepare"].append(took)
        tokenizer = load_tokenizer(str(trained))
        seconds["map"].append(timed(lambda to=target / "map.arrow", its=tokenizer: map_alone(corpus, its, to))[0])
        seconds["processes"].append(timed(lambda to=target / "more": prepare(trained, to, os.cpu_count()))[0])
        os.environ.pop("TOKENIZERS_PARALLELISM", None)  # which several processes switch off
    wall, cpu = ({name: statistics.median(each[kind] for each in both) for name, both in seconds.items()} for kind in (0, 1))
    figures = {
        "train_s": train_s,
        **{f"{name}_s": value for name, value in wall.items()},
        **{f"{name}_cpu_s": value for name, value in cpu.items()},
        "ratio": wall["prepare"] / wall["map"],
        "cpu_ratio": cpu["prepare"] / cpu["map"],
        "total_s": train_s + wall["prepare"],
        "megabytes": corpus.data.nbytes / 1e6,
    }
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    return {**rounded, "documents": metadata.documents, "tokens": metadata.tokens}


def timed(work: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Seconds that it took, seconds of work on all cores, and its result."""
    begin, before = time.perf_counter(), sum(os.times()[:4])
    result = work()
    return (time.perf_counter() - begin, sum(os.times()[:4]) - before), result


def prepare(tokenizer: Path, target: Path, num_proc: int | None) -> Any:
    """The data set as bookcorpus.py makes it."""
    corpora = [Corpus("stdlib", load_corpus("stdlib"))]
    return build(corpora, load_tokenizer(str(tokenizer)), "trained before", target, Settings(SEQ_LEN, num_proc=num_proc))[0]


def map_alone(corpus: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, target: Path) -> datasets.Dataset:
    """The tokens of the corpus as `datasets.map` makes them by default."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]}

    return corpus.map(encode, batched=True, remove_columns=["text"], cache_file_name=str(target), load_from_cache_file=False)


if __name__ == "__main__":
    main()
