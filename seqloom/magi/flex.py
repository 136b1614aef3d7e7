"""PyTorch's FlexAttention on bands: one fused call for any mask, on GPUs, with a soft cap and grouped heads.

Role: the kernel 'flex'. The mask is a list of column intervals for every row, and a block mask that says which blocks of 128 x 128 cells
are empty, full or mixed, counted from the bands without writing a cell. Paper: Dong et al., FlexAttention, arXiv:2412.05496.

FlexAttention's backward knows the output and log-sum-exp of its own keys only. With w = exp(own lse - final lse), the gradients through
the final softmax are those of (own output, own lse) for the gradients (w g, w (rowsum(g x own output) - delta)): so the backward runs the
forward again, and autograd does the rest. In and out: as `seqloom.magi.kernels.Kernel`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from seqloom.magi import table as tables
from seqloom.magi.bands import Band
from seqloom.magi.kernels import Final, Gradients, no_gradients, nothing_yet
from seqloom.ops.precision import sum_dtype
from seqloom.ops.transfer import to_device

BLOCK = 128
LEAST_HEAD_DIM = 16
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Flex:
    """One call for all bands of a buffer."""

    name = "flex"

    @staticmethod
    def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool) -> str | None:
        """Why these tensors cannot be run here, as the end of a sentence; None where they can."""
        if device.type != "cuda":
            return f"needs a GPU, not {device.type}: PyTorch has no backward of FlexAttention elsewhere"
        if dtype not in DTYPES:
            return f"takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
        if head_dim < LEAST_HEAD_DIM:
            return f"takes head sizes from {LEAST_HEAD_DIM} on, not {head_dim}"
        return None if importlib.util.find_spec("triton") else "needs the package triton, which is not installed"

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bands: Sequence[Band], scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """As `Kernel.forward`."""
        if not bands:
            return nothing_yet(query)
        dtype = sum_dtype(query.dtype)
        output, lse = _run(*map(_heads, (query, key, value)), tuple(bands), scale, softcap)
        return output[0].transpose(0, 1).to(dtype), lse[0].t().to(dtype)

    def backward(self, given: Final, bands: Sequence[Band], scale: float, softcap: float) -> Gradients:
        """As `Kernel.backward`."""
        if not bands:
            return no_gradients(given)
        grad, query, key, value, _, lse, delta = given
        dtype = sum_dtype(query.dtype)
        with recorded():
            leaves = [_heads(x).detach().requires_grad_() for x in (query, key, value)]
            own, own_lse = _run(*leaves, tuple(bands), scale, softcap)
            with torch.no_grad():
                final = _heads(lse.unsqueeze(-1))[..., 0]
                weight = torch.where(own_lse == float("-inf"), 0.0, (own_lse - final).exp())
                d_own = _heads(grad).to(dtype) * weight.unsqueeze(-1)
                d_lse = (d_own * own.to(dtype)).sum(-1) - weight * _heads(delta.unsqueeze(-1))[..., 0]
            found = torch.autograd.grad((own, own_lse), leaves, (d_own.to(own.dtype), d_lse.to(own_lse.dtype)))
        return tuple(x[0].transpose(0, 1).to(dtype) for x in found)


@contextmanager
def recorded() -> Iterator[None]:
    """Autograd records, even inside of an operator that is registered with PyTorch's library, where its dispatch keys are switched off."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def _run(query: Tensor, key: Tensor, value: Tensor, bands: tuple[Band, ...], scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of `[1, heads, rows, dim]`; autograd follows."""
    mask = block_mask(bands, query.shape[2], key.shape[2], query.device)
    cap = functools.partial(_capped, cap=softcap) if softcap else None
    run = _compiled() if query.device.type == "cuda" else flex_attention
    options = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1], "return_aux": AuxRequest(lse=True)}
    output, aux = run(query, key, value, cap, mask, **options)
    return output, aux.lse


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """Not compiled it would write out all scores; `fullgraph`, so that it fails rather than fall back to that."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _capped(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor, cap: float) -> Tensor:
    return torch.tanh(score / cap) * cap


def _heads(x: Tensor) -> Tensor:
    """`[rows, heads, dim]` -> `[1, heads, rows, dim]`."""
    return x.transpose(0, 1).unsqueeze(0).contiguous()


# --- the mask --------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def block_mask(bands: tuple[Band, ...], rows: int, columns: int, device: torch.device) -> BlockMask:
    """The mask of the bands over `rows` x `columns`, as FlexAttention takes it."""
    cells = block_cells(bands, rows, columns)
    full = cells == BLOCK * BLOCK
    mixed = (cells > 0) & ~full
    lists = [to_device(torch.from_numpy(x), device)[None, None] for chosen in (mixed, full) for x in _block_lists(chosen)]
    starts, ends = (to_device(torch.from_numpy(x), device) for x in intervals(bands, rows))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=_inside(starts, ends), seq_lengths=(rows, columns))


def block_cells(bands: Sequence[Band], rows: int, columns: int) -> np.ndarray:
    """int64 `[row blocks, column blocks]`: cells of the bands in every block."""
    table = np.array([(b.q_start, b.q_end, b.k_start, b.k_end, b.lo, b.hi) for b in bands], np.int64)
    row_starts, column_starts = np.arange(0, rows, BLOCK), np.arange(0, columns, BLOCK)
    strips = tables.cut(table, tables.ROWS, row_starts, row_starts + BLOCK)
    blocks = tables.cut(strips.table, tables.COLUMNS, column_starts, column_starts + BLOCK)
    cells = np.zeros((len(row_starts), len(column_starts)), np.int64)
    np.add.at(cells, (strips.part[blocks.band], blocks.part), tables.areas(blocks.table))
    return cells


def _block_lists(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every row of blocks: how many are chosen, and all column numbers, those chosen first; int32."""
    return chosen.sum(1).astype(np.int32), np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)


def intervals(bands: Sequence[Band], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of every row as half-open intervals, int32 `[intervals, rows]` starts and ends; unused ones are empty.

    Their number is rounded up to a power of two: compiled code is made anew for another number.
    """
    used = np.zeros(rows, np.int64)
    for band in bands:
        used[band.q_start : band.q_end] += 1
    most = 1 << max(0, int(used.max()) - 1).bit_length()
    starts, ends = (np.zeros((most, rows), np.int32) for _ in range(2))
    used[:] = 0
    for band in bands:
        row = np.arange(band.q_start, band.q_end)
        starts[used[row], row] = np.maximum(band.k_start, row + band.lo)
        ends[used[row], row] = np.minimum(band.k_end, row + band.hi + 1)
        used[row] += 1
    return starts, ends


def _inside(starts: Tensor, ends: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def inside(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        found = (starts[0, row] <= column) & (column < ends[0, row])
        for interval in range(1, len(starts)):
            found = found | ((starts[interval, row] <= column) & (column < ends[interval, row]))
        return found

    return inside
