"""Is a checkpoint what it was when it was written? Sizes and digests of a step folder or of a merged file, the work shared by the ranks.

Role in the pipeline: `read` verifies before it loads, `write` before it refuses to save a step again, `merge` and `inspect` on request.
Every function is collective and answers the same on every rank: None, or the part of a sentence that says what is wrong.
"""

from __future__ import annotations

import re
from pathlib import Path

from seqloom.checkpoint import folders, group
from seqloom.checkpoint.digest import BLOCK_BYTES, check_blocks, hash_blocks, read_exactly, root_digest
from seqloom.checkpoint.manifest import Manifest
from seqloom.checkpoint.reader import NO_DIGEST, MergedReader
from seqloom.errors import UserError

_DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"')


def damage(path: Path, *, digests: bool = True) -> str | None:
    """What is wrong with a step folder or a merged file, or None; with `digests=False` only the manifest and the sizes are checked."""
    if path.is_dir():
        local = _step_damage(path) if digests else folders.structural_damage(path)
        return next((answer for answer in group.gather_json(local) if answer is not None), None)
    return _merged_damage(path, digests)


def digest_place(header: bytes) -> tuple[int, int]:
    """Where a merged file's own digest stands in its first bytes: (start, end). Raises `ValueError` where there is not exactly one."""
    matches = list(_DIGEST.finditer(header))
    if len(matches) != 1:
        raise ValueError(f"{len(matches)} digests in the header")
    return matches[0].span(1)


def _step_damage(folder: Path) -> str | None:
    """What this rank finds: the manifest, all sizes, and its share of the blocks."""
    problem = folders.structural_damage(folder)
    if problem is not None:
        return problem
    try:
        manifest = Manifest.read(folder)
    except UserError as error:
        return str(error)
    checks = [check for name, entry in manifest.files.items() for check in entry.checks(folder / name)]
    bad = check_blocks(checks[group.rank() :: group.world_size()])
    if not bad:
        return None
    check, found = bad[0]
    first = check.index * BLOCK_BYTES
    return f"{check.path.relative_to(folder)} from byte {first} has digest {found}, the manifest says {check.digest}"


def _merged_damage(path: Path, digests: bool) -> str | None:
    blocks, problem = {}, None
    try:
        reader = MergedReader(path)
        reader.close()
        if digests:
            blocks = _own_blocks(path)
    except (UserError, ValueError, OSError) as error:
        problem = str(error)
    answers = group.gather_json({"problem": problem, "blocks": blocks})
    problems = [answer["problem"] for answer in answers if answer["problem"] is not None]
    if problems or not digests:
        return problems[0] if problems else None
    digests_by_index = {int(index): digest for answer in answers for index, digest in answer["blocks"].items()}
    found = root_digest([digests_by_index[index] for index in sorted(digests_by_index)])
    return None if found == reader.digest else f"{path.name} has digest {found}, its header says {reader.digest}"


def _own_blocks(path: Path) -> dict[int, str]:
    """This rank's share of a merged file's block digests, taken with zeros where the file's own digest stands."""
    with open(path, "rb", buffering=0) as file:
        length = 8 + int.from_bytes(read_exactly(file.fileno(), 8, 0), "little")
        header = bytes(read_exactly(file.fileno(), length, 0))
    start, end = digest_place(header)
    zeroed = header[:start] + NO_DIGEST.encode() + header[end:]
    count = -(-path.stat().st_size // BLOCK_BYTES)
    indices = range(group.rank(), count, group.world_size())
    return dict(zip(indices, hash_blocks(path, indices, zeroed), strict=True))
