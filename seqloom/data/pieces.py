"""Tokenizing a corpus in pieces: in parallel, and so that a run that was killed goes on where it stopped.

In: a corpus and an encoder. Out: a `TokenStore`. Every piece is a file of its own that appears when it is complete; pieces that are there
already are not made again. The folder of the pieces is named after everything that decides what they hold, so that nothing stale is
ever taken for good.

A tokenizer written in Rust uses all cores from one process: two threads keep it busy while tokens are written. One written in Python,
or the template of chats, uses one core a process, so there `num_proc` processes share the pieces.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

import numpy as np

from seqloom.data.encode import Encoder
from seqloom.data.progress import progress
from seqloom.data.tokens import TokenStore, holds, write_tokens
from seqloom.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

PIECES = 64  # as many as the sizes below allow
MIN_BYTES, MAX_BYTES = 2**20, 16 * 2**20  # of text in a piece
BATCH_BYTES = 2 * 2**20  # of text encoded at once
MAX_BATCH = 10_000
THREADS = 2


@dataclass(frozen=True)
class Work:
    """The documents of a corpus and what to do with them; piece n of `bounds` is `bounds[n] : bounds[n + 1]`, kept in `folder`."""

    documents: Dataset
    encoder: Encoder
    folder: Path
    bounds: tuple[int, ...]
    batch: int

    def path(self, piece: int) -> Path:
        """The file of a piece."""
        return self.folder / f"piece-{piece:05d}.arrow"

    def size(self, piece: int) -> int:
        """Documents of a piece."""
        return self.bounds[piece + 1] - self.bounds[piece]

    def do(self, piece: int) -> int:
        """Make a piece and return its number."""
        write_tokens(self.path(piece), self._batches(piece))
        return piece

    def _batches(self, piece: int) -> Iterator[list[np.ndarray]]:
        (column,) = self.documents.column_names
        for start in range(self.bounds[piece], self.bounds[piece + 1], self.batch):
            stop = min(start + self.batch, self.bounds[piece + 1])
            yield self.encoder(self.documents[start:stop][column])


def tokenize(documents: Dataset, encoder: Encoder, folder: Path, num_proc: int = 1, name: str = "the corpus") -> TokenStore:
    """The tokens of every document, in the order of the corpus (one column), kept in `folder`; what is there already is used.

    Says on stderr how far it is, and how much was there. Raises UserError when a process that tokenizes is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work = _plan(documents, encoder, folder)
    pieces = range(len(work.bounds) - 1)
    missing = [piece for piece in pieces if not holds(work.path(piece), work.size(piece))]
    done = len(documents) - sum(map(work.size, missing))
    if done:
        print(f"goes on: {done:,} of {len(documents):,} documents of {name} are tokenized already", file=sys.stderr, flush=True)
    with progress(f"tokenize {name}", len(documents), done) as advance:
        processes = min(num_proc, len(missing))
        for piece in _in_processes(work, missing, processes) if processes > 1 else _in_threads(work, missing):
            advance(work.size(piece))
    return TokenStore([work.path(piece) for piece in pieces])


def _plan(documents: Dataset, encoder: Encoder, folder: Path) -> Work:
    count, nbytes = len(documents), max(documents.data.nbytes, 1)
    pieces = nbytes // int(np.clip(nbytes // PIECES, MIN_BYTES, MAX_BYTES))
    bounds = np.linspace(0, count, int(np.clip(pieces, 1, count)) + 1).astype(int)
    return Work(documents, encoder, folder, tuple(bounds.tolist()), int(np.clip(BATCH_BYTES * count // nbytes, 1, MAX_BATCH)))


def _in_threads(work: Work, pieces: list[int]) -> Iterator[int]:
    """Make the pieces and yield each when it is done; after an error no other one is begun."""
    executor = ThreadPoolExecutor(THREADS)
    try:
        for future in as_completed([executor.submit(work.do, piece) for piece in pieces]):
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)


def _in_processes(work: Work, pieces: list[int], count: int) -> Iterator[int]:
    """The same by `count` processes, which inherit the work."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive the fork
    context = get_context("fork")
    todo, done = context.Queue(), context.Queue()
    for piece in [*pieces, *[None] * count]:
        todo.put(piece)
    processes = [context.Process(target=_serve, args=(work, todo, done), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        for _ in pieces:
            piece, error = _next_done(done, processes)
            if error is not None:
                raise error
            yield piece
    finally:
        todo.cancel_join_thread()
        for process in processes:
            process.terminate()
            process.join()


def _next_done(done: Any, processes: list[Any]) -> tuple[int, Exception | None]:
    while True:
        try:
            return done.get(timeout=1)
        except Empty:
            if any(process.exitcode not in (None, 0) for process in processes):
                raise UserError("a process that tokenizes was killed (no memory left?): start again with a smaller --num_proc") from None


def _serve(work: Work, todo: Any, done: Any) -> None:
    """What each process does: the next piece, until there is None."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for piece in iter(todo.get, None):
        try:
            done.put((work.do(piece), None))
        except Exception as error:
            done.put((piece, error))


def _end_with_parent() -> None:
    """A process must not outlive the one that started it, however that ended."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def only_one(folder: Path, target: Path) -> Iterator[None]:
    """Make `folder` and hold it for this process alone; if nothing was put in it, it goes away again.

    Raises UserError while another process works on `target`, or if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent} ({error.strerror}): choose an output folder that can be written") from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process prepares {target}: wait for it, or choose another --save_path") from error
        try:
            yield
        finally:
            if folder.is_dir() and os.listdir(folder) == ["lock"]:
                shutil.rmtree(folder)
