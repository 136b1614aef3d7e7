"""Rows of documents laid out for attention that splits the sequence: the key of a micro-batch, and its inputs in the key's order.

Role in the pipeline: a program with `CONTEXT` attends by the key made last (`seqloom.magi.operator`). Before each micro-batch `prepare`
plans that key from the documents' borders, with the exchanges of all sliding windows that layers have (`WINDOWS`), and brings ids, labels
and positions into its order, on the host, with no process talking to another; a step then makes the key the current one and takes its
pieces as ever. Nothing but attention depends on the order of tokens.

In: micro-batches of one scale unit, `[b, l]`, with `cu_seqlens`. Out: `Prepared` micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from seqloom.data.documents import CU_SEQLENS, restarting_positions
from seqloom.errors import UserError
from seqloom.magi.key import DistAttnRuntimeKey, make_key, use_key
from seqloom.magi.share import documents_mask, even_chunk_size
from seqloom.magi.windows import Windows, cut_to_window, widest
from seqloom.runtime.mesh import axis_group, axis_rank
from seqloom.runtime.program import Program


@dataclass(frozen=True)
class Prepared:
    """A micro-batch whose tokens lie in the order of `key`; without a key it is as the loader made it."""

    inputs: Mapping[str, Tensor]
    key: DistAttnRuntimeKey | None

    def use(self) -> Mapping[str, Tensor]:
        """Attend by this micro-batch's key from now on; returns its inputs."""
        if self.key is not None:
            use_key(self.key)
        return self.inputs


class Layout:
    """Lays micro-batches out for a program: `prepare` may run in a thread, ahead of the step."""

    def __init__(self, program: Program, mesh: DeviceMesh) -> None:
        self._shape = tuple(program.SHAPES["input_ids"])
        self._context = getattr(program, "CONTEXT", None)
        self._windows: Windows = getattr(program, "WINDOWS", (None,))
        if self._context is not None:
            batch, sequence = self._context
            self._parts = prod(mesh[axis].size() for axis in batch)
            self._part = axis_rank(mesh, *batch) if batch else 0
            self._group: ProcessGroup | None = axis_group(mesh, *sequence) if sequence else None
            self._group = self._group if self._group is not None and self._group.size() > 1 else None
            self._ranks = 1 if self._group is None else self._group.size()

    def prepare(self, micro_batch: Mapping[str, Tensor]) -> Prepared:
        """A micro-batch with its key. Documents are those of `cu_seqlens`; without it every row is one.

        Raises `UserError` for documents whose borders do not fit the rows, and for documents that the program knows nothing of.
        """
        inputs = {name: tensor for name, tensor in micro_batch.items() if name != CU_SEQLENS}
        borders = micro_batch.get(CU_SEQLENS)
        if self._context is None:
            if borders is not None and len(borders) != self._shape[0] + 1:
                raise UserError(
                    "the data has several documents in a row and the program attends over whole rows: compile again for this data set"
                )
            return Prepared(inputs, None)
        rows, length = self._shape
        borders = np.arange(rows + 1) * length if borders is None else borders.numpy()
        _check(borders, rows, length)
        inputs.setdefault("position_ids", torch.from_numpy(restarting_positions(borders)).view(rows, length))
        share = rows // self._parts * length
        keys = [self._key(_within(borders, part * share, (part + 1) * share)) for part in range(self._parts)]
        for window in self._windows:
            keys[self._part].within(window).exchange  # noqa: B018 - planned here, so that no layer has to
        return Prepared({name: self._ordered(tensor, keys) for name, tensor in inputs.items()}, keys[self._part])

    def _key(self, borders: np.ndarray) -> DistAttnRuntimeKey:
        """The key of documents; their rows lie as the widest of the windows wants them."""
        mask = documents_mask(borders.tolist())
        chunk_size = even_chunk_size(mask.total_seqlen_q, self._ranks)
        widest_mask = cut_to_window(mask, widest(self._windows))
        key = make_key(widest_mask, None, None, None, self._group, chunk_size=chunk_size, current=False)
        return replace(key, mask=mask)

    def _ordered(self, whole: Tensor, keys: list[DistAttnRuntimeKey]) -> Tensor:
        """Tokens so that the piece of each rank of the group, cut from the sequence as ever, holds the rows that its key gives it."""
        if self._ranks == 1:
            return whole
        parts = [self._laid_out(part, key) for part, key in zip(whole.chunk(self._parts), keys, strict=True)]
        return torch.cat(parts)

    def _laid_out(self, part: Tensor, key: DistAttnRuntimeKey) -> Tensor:
        tokens, rows = part.reshape(-1), len(part)
        pieces = [tokens[torch.from_numpy(key.dispatch.position_ids(rank))].view(rows, -1) for rank in range(self._ranks)]
        return torch.cat(pieces, dim=1)


def typical_batch(documents: Sequence[int], rows: int) -> dict[str, Tensor]:
    """What says that each of `rows` rows holds documents of these lengths; nothing where there are none."""
    if not documents:
        return {}
    return {CU_SEQLENS: torch.from_numpy(np.concatenate(([0], np.cumsum(list(documents) * rows))))}


def _within(borders: np.ndarray, start: int, end: int) -> np.ndarray:
    """The borders between two tokens, counted from the first of them; documents never cross rows, so both are borders."""
    return borders[(borders >= start) & (borders <= end)] - start


def _check(borders: np.ndarray, rows: int, length: int) -> None:
    wanted = np.arange(0, rows * length + 1, length)
    if borders[0] != 0 or borders[-1] != rows * length or (np.diff(borders) < 1).any() or not np.isin(wanted, borders).all():
        raise UserError(
            f"the documents' borders of a micro-batch do not fit its {rows} rows of {length} tokens: they must rise from 0 to "
            f"{rows * length} and hold every border of a row"
        )
