"""Digests of files, block by block, so that writing can hash as it goes and many threads or ranks can check one file.

Role in the pipeline: `write` and `merge` feed bytes to a `BlockHasher`; `read` and `inspect` check files with `check_blocks`.
A file is cut into blocks of `BLOCK_BYTES`; each has a SHA-256, and the file's digest is the SHA-256 of these in order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HASH = "sha256"
BLOCK_BYTES = 16 * 2**20
HEX_LENGTH = 64


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def root_digest(blocks: Sequence[str]) -> str:
    """The digest of a file from those of its blocks: the hash of their raw bytes in order."""
    return hash_bytes(b"".join(bytes.fromhex(block) for block in blocks))


class BlockHasher:
    """Hashes a stream of bytes in blocks."""

    def __init__(self) -> None:
        self._blocks: list[str] = []
        self._current = hashlib.sha256()
        self._filled = 0

    def update(self, data: memoryview | bytes) -> None:
        """Take the next bytes of the file."""
        view = memoryview(data)
        while len(view):
            part = view[: BLOCK_BYTES - self._filled]
            self._current.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BLOCK_BYTES:
                self._close()

    def _close(self) -> None:
        self._blocks.append(self._current.hexdigest())
        self._current = hashlib.sha256()
        self._filled = 0

    def blocks(self) -> tuple[str, ...]:
        """The digests of all blocks, the last of which may be short. An empty file has none."""
        if self._filled:
            self._close()
        return tuple(self._blocks)


@dataclass(frozen=True)
class BlockCheck:
    """One block to check: bytes `index * BLOCK_BYTES` onwards of `path` should hash to `digest`."""

    path: Path
    index: int
    digest: str


def check_blocks(checks: Sequence[BlockCheck]) -> list[tuple[BlockCheck, str]]:
    """The blocks that are not what they should be, each with the digest found, or the system's message where it cannot be read."""
    with _pool() as pool:
        found = list(pool.map(_found_digest, checks))
    return [(check, digest) for check, digest in zip(checks, found, strict=True) if digest != check.digest]


def hash_blocks(path: Path, indices: Sequence[int], overlay: bytes = b"") -> list[str]:
    """Digests of some blocks of a file, as if the file began with `overlay` in place of its own first bytes."""
    with _pool() as pool:
        return list(pool.map(lambda index: _hash_block(path, index, overlay), indices))


def _pool() -> ThreadPoolExecutor:
    """Threads to hash with: as many as the processors, at most 8, each holding one block in memory."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _found_digest(check: BlockCheck) -> str:
    try:
        return _hash_block(check.path, check.index)
    except OSError as error:
        return error.strerror or str(error)


def _hash_block(path: Path, index: int, overlay: bytes = b"") -> str:
    start = index * BLOCK_BYTES
    with open(path, "rb", buffering=0) as file:
        block = read_exactly(file.fileno(), BLOCK_BYTES, start)
    replacement = overlay[start : start + BLOCK_BYTES]
    block[: len(replacement)] = replacement
    return hash_bytes(block)


def read_exactly(descriptor: int, count: int, offset: int) -> bytearray:
    """Up to `count` bytes from `offset`, fewer only at the end of the file."""
    data = bytearray(count)
    filled = read_into(descriptor, memoryview(data), offset)
    return data if filled == count else data[:filled]


def read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill `view` with the bytes from `offset`; returns how many there were."""
    filled = 0
    while filled < len(view):
        count = os.preadv(descriptor, [view[filled:]], offset + filled)
        if count == 0:
            break
        filled += count
    return filled
