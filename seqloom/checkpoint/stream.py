"""Reads of a file that check whole blocks of it on the way, so that a checked load reads its bytes once.

Role in the pipeline: `read` puts a `BlockStream` before each file that it fills tensors from. What a tensor wants is read to where the
tensor wants it and hashed there, a chunk at a time, while it is in the processor's cache; what lies between is read to be hashed only.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from seqloom.checkpoint.digest import BLOCK_BYTES, CHUNK_BYTES, Block, new_block_hash, read_exactly, read_into


class BlockStream:
    """Reads from one file, and the digests of some of its blocks.

    Reading at ascending places reads every byte of those blocks once; a read that goes back is a plain one. `finish` reads what is left
    of the blocks and returns all their digests. Where `overlay` reaches, which nobody reads, it is hashed in place of the first bytes.
    """

    def __init__(self, path: Path, size: int, indices: Collection[int], overlay: bytes = b"") -> None:
        self._blocks = {index: Block(path, index, overlay) for index in indices}
        self._size = size
        self._found: dict[int, str] = {}
        self._open: Block | None = None
        self._at = 0
        self._hash: Any = None

    def read_into(self, descriptor: int, view: memoryview, offset: int) -> int:
        """Fill `view` with the bytes from `offset`; returns how many there were."""
        filled = 0
        while filled < len(view):
            position = offset + filled
            end = (position // BLOCK_BYTES + 1) * BLOCK_BYTES
            part = view[filled : filled + min(CHUNK_BYTES, end - position)]
            hashing = self._reach(descriptor, position)
            count = read_into(descriptor, part, position)
            if hashing:
                self._take(part[:count])
            filled += count
            if count < len(part):
                break
        return filled

    def finish(self, descriptor: int) -> dict[int, str]:
        """The digest of every block, by index."""
        for index, block in self._blocks.items():
            if index not in self._found:
                if block is not self._open:
                    self._reach(descriptor, block.start)
                self._close(descriptor)
        return dict(self._found)

    def _reach(self, descriptor: int, position: int) -> bool:
        """Come to `position`, hashing what lies before it in its block; False where its bytes are hashed already or need not be."""
        block = self._blocks.get(position // BLOCK_BYTES)
        if block is None or block.index in self._found:
            return False
        if block is not self._open:
            self._close(descriptor)
            self._open, self._at, self._hash = block, block.start, new_block_hash()
        if position < self._at:
            return False
        self._read_gap(descriptor, position)
        return True

    def _close(self, descriptor: int) -> None:
        """Hash the open block to its end and note its digest."""
        if self._open is None:
            return
        self._read_gap(descriptor, min(self._open.start + BLOCK_BYTES, self._size))
        self._found[self._open.index] = self._hash.hexdigest()
        self._open = None

    def _read_gap(self, descriptor: int, end: int) -> None:
        while self._at < end:
            data = memoryview(read_exactly(descriptor, min(CHUNK_BYTES, end - self._at), self._at))
            if not data:
                return
            self._take(self._open.laid_over(data, self._at))

    def _take(self, data: memoryview) -> None:
        self._hash.update(data)
        self._at += len(data)
