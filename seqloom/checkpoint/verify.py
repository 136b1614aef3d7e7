"""Is a checkpoint what it was when it was written? Sizes and digests of a step folder or of a merged file, the work shared by the ranks.

Role in the pipeline: `read` verifies while it loads, `write` before it refuses to save a step again, `merge` and `inspect` on request.
`damage`, `shared_digests` and `disagreement` are collective and answer the same on every rank: None, or the part of a sentence that
says what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from seqloom.checkpoint import folders, group
from seqloom.checkpoint.digest import BLOCK_BYTES, Block, hash_blocks, read_exactly, root_digest
from seqloom.checkpoint.reader import NO_DIGEST, MergedReader
from seqloom.errors import UserError

_DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"')
_HEX = re.compile("[0-9a-f]+")
BlockId = tuple[str, int]


@dataclass(frozen=True)
class CheckedFile:
    """A file to check: where it lies, its size, the digests of its blocks, or None where only that of the whole is known."""

    path: Path
    size: int
    blocks: tuple[str, ...] | None
    overlay: bytes = b""

    @property
    def indices(self) -> range:
        """The numbers of its blocks."""
        return range(-(-self.size // BLOCK_BYTES))


@dataclass(frozen=True)
class Contents:
    """What the bytes of a checkpoint should hash to: file by file, and for a merged file `root`, the digest over all blocks."""

    files: Mapping[str, CheckedFile]
    root: str | None = None

    @classmethod
    def of(cls, path: Path) -> Contents:
        """Of a step folder or a merged file. Raises `UserError` where it cannot be read."""
        if path.is_dir():
            step = folders.open_step(path)
            return cls({name: CheckedFile(step.file(name), f.nbytes, f.blocks) for name, f in step.manifest.files.items()})
        reader = MergedReader(path)
        reader.close()
        return cls({path.name: CheckedFile(path, path.stat().st_size, None, _header_without_digest(path))}, reader.digest or "none")

    def block_ids(self) -> list[BlockId]:
        """All blocks, file after file."""
        return [(name, index) for name, file in self.files.items() for index in file.indices]

    def first_wrong(self, found: Mapping[BlockId, str]) -> str | None:
        """A sentence part about the first block found that is not as it should be, as far as that is known block by block."""
        for (name, index), digest in sorted(found.items()):
            blocks = self.files[name].blocks
            if blocks is not None and digest != blocks[index]:
                return f"{name} from byte {index * BLOCK_BYTES} has digest {digest}, the manifest says {blocks[index]}"
        return None


def damage(path: Path, *, digests: bool = True) -> str | None:
    """What is wrong with a step folder or a merged file, or None; with `digests=False` only the manifest and the sizes are checked."""
    contents, problem = _contents(path)
    problems = [answer for answer in group.gather_json(problem) if answer is not None]
    if problems or not digests:
        return problems[0] if problems else None
    return disagreement(contents, shared_digests(contents, ()))


def damage_alone(folder: Path) -> str | None:
    """What is wrong with a step folder, or None: all digests, by this process alone. Not collective."""
    contents, problem = _contents(folder)
    if contents is None:
        return problem
    ids = contents.block_ids()
    digests = hash_blocks([Block(contents.files[name].path, index) for name, index in ids])
    return contents.first_wrong(dict(zip(ids, digests, strict=True)))


def _contents(path: Path) -> tuple[Contents | None, str | None]:
    """What should be there, or what is wrong as far as the manifest and the sizes tell."""
    try:
        problem = folders.structural_damage(path) if path.is_dir() else None
        return (Contents.of(path), None) if problem is None else (None, problem)
    except (UserError, ValueError, OSError) as error:
        return None, str(error)


def shared_digests(contents: Contents, claimed: Collection[BlockId]) -> dict[BlockId, str]:
    """The digests of this rank's share of the blocks that no rank claims to hash itself."""
    taken = {(name, index) for claims in group.gather_json(_by_file(claimed)) for name, indices in claims.items() for index in indices}
    left = [block for block in contents.block_ids() if block not in taken]
    mine = left[group.rank() :: group.world_size()]
    files = contents.files
    return dict(zip(mine, hash_blocks([Block(files[n].path, i, files[n].overlay) for n, i in mine]), strict=True))


def disagreement(contents: Contents, found: Mapping[BlockId, str]) -> str | None:
    """Compare what the ranks found, all blocks of the checkpoint together, with what should be there."""
    blocks = [] if contents.root is None else [(index, digest) for (_, index), digest in found.items()]
    answers = group.gather_json({"problem": contents.first_wrong(found), "blocks": blocks})
    problem = next((answer["problem"] for answer in answers if answer["problem"] is not None), None)
    if problem is not None or contents.root is None:
        return problem
    name, file = next(iter(contents.files.items()))
    by_index = {index: digest for answer in answers for index, digest in answer["blocks"]}
    try:
        whole = root_digest([by_index[index] for index in file.indices])
    except ValueError:  # a block that could not be read has the system's message in place of a digest
        return f"{name} cannot be read: {next(text for text in by_index.values() if not _HEX.fullmatch(text))}"
    return None if whole == contents.root else f"{name} has digest {whole}, its header says {contents.root}"


def digest_place(header: bytes) -> tuple[int, int]:
    """Where a merged file's own digest stands in its first bytes: (start, end). Raises `ValueError` where there is not exactly one."""
    matches = list(_DIGEST.finditer(header))
    if len(matches) != 1:
        raise ValueError(f"{len(matches)} digests in the header")
    return matches[0].span(1)


def _by_file(blocks: Collection[BlockId]) -> dict[str, list[int]]:
    answer: dict[str, list[int]] = {}
    for name, index in blocks:
        answer.setdefault(name, []).append(index)
    return answer


def _header_without_digest(path: Path) -> bytes:
    """A merged file's first bytes with zeros where its own digest stands: what the digest was taken over."""
    with open(path, "rb", buffering=0) as file:
        length = 8 + int.from_bytes(read_exactly(file.fileno(), 8, 0), "little")
        header = bytes(read_exactly(file.fileno(), length, 0))
    start, end = digest_place(header)
    return header[:start] + NO_DIGEST.encode() + header[end:]
