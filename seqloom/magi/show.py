"""`python -m seqloom magi`: how a mask is laid over ranks, what travels, what that is predicted to take, and a picture of it.

In: a mask in words (`parse_mask`), a number of ranks, a machine. Out: lines of text beside the area-only dispatch and an all-gather, and a
PNG of the mask coloured by the rank that computes each cell.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from seqloom.errors import UserError
from seqloom.magi import masks
from seqloom.magi.dispatch import Dispatch, plan_dispatch
from seqloom.magi.exchange import Exchange, plan_exchange
from seqloom.magi.mask import AttnMask

PIXELS = 768  # of the picture, along each side
FORMS = "causal, full, packed:FILE (lengths of documents), window:LEFT, window:LEFT:RIGHT, global:SIZE:LEFT or blocks:SIZE"


@dataclass(frozen=True)
class Layout:
    """What is asked for: heads and head size of attention, and how it is planned."""

    ranks: int
    chunk_size: int | None = None
    hardware: str | None = None
    num_heads_q: int = 32
    num_heads_kv: int = 8
    head_dim: int = 128
    uneven: bool = False
    degree: int = 1


def parse_mask(text: str, seq_len: int | None) -> AttnMask:
    """The mask in words: one of `FORMS`, over `seq_len` rows (of `packed` those of its file). Raises `UserError` for anything else."""
    name, *numbers = text.split(":")
    if name == "packed" and numbers:
        return masks.packed([0, *accumulate(document_lengths(Path(":".join(numbers))))])
    sizes = [int(number) if number.isdigit() else -1 for number in numbers]
    made = {
        ("causal", 0): lambda cu: masks.packed(cu),
        ("full", 0): lambda cu: masks.packed(cu, causal=False),
        ("window", 1): lambda cu: masks.sliding_window(cu, sizes[0]),
        ("window", 2): lambda cu: masks.sliding_window(cu, *sizes),
        ("global", 2): lambda cu: masks.global_window(cu, *sizes),
        ("blocks", 1): lambda cu: masks.block_causal(cu, *sizes),
    }
    if (name, len(numbers)) not in made or min(sizes, default=0) < 0:
        raise UserError(f"--mask {text} is not a mask: give {FORMS}")
    if seq_len is None:
        raise UserError(f"--mask {text} needs the length of the sequence: give --seq_len")
    return made[name, len(numbers)]([0, seq_len])


def document_lengths(path: Path) -> list[int]:
    """Lengths of documents from a file of numbers, a JSON list or apart by blanks, commas and lines. Raises `UserError` for others."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--mask packed:{path}: the file cannot be read ({error}): give a file of document lengths") from error
    try:
        lengths = json.loads(text) if text.lstrip().startswith("[") else [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise UserError(f"--mask packed:{path}: {error}: give whole numbers, the lengths of the documents") from error
    if not lengths or not all(type(length) is int and length > 0 for length in lengths):
        raise UserError(f"--mask packed:{path}: the lengths of documents must be whole numbers above 0")
    return lengths


def report(mask: AttnMask, layout: Layout) -> Iterator[str]:
    """The lines: mask, dispatch, comparison, ranks, stages."""
    chosen, plain = planned(mask, layout), planned(mask, layout, "area")
    dispatch = chosen.dispatch
    rows, padding = dispatch.padded_seqlen // layout.ranks, dispatch.padded_seqlen - mask.total_seqlen_q
    yield f"mask      {mask.total_seqlen_q:,} rows, {len(mask.bands):,} slices, {mask.area:,} cells"
    yield f"dispatch  {layout.ranks} ranks, chunks of {dispatch.chunk_size:,} rows, {rows:,} rows a rank, {padding:,} of padding in all"
    yield ""
    yield f"{'':<12}{'balance':>9}{'rows received':>16}{'of all-gather':>15}{'compute ms':>12}{'exchange ms':>13}{'step ms':>9}"
    yield _summary("chosen", chosen)
    yield _summary("area only", plain)
    yield ""
    yield f"{'rank':<6}{'chunks':>8}{'cells':>18}{'rows received':>16}{'rows sent':>12}{'compute ms':>12}{'exchange ms':>13}"
    compute, exchange = seconds(chosen)
    for rank, area in enumerate(dispatch.areas):
        row = f"{rank:<6}{len(dispatch.partitions[rank]):>8}{area:>18,}{chosen.received_rows[rank]:>16,}{chosen.sent_rows[rank]:>12,}"
        yield f"{row}{compute[rank] * 1e3:>12.3f}{exchange[rank] * 1e3:>13.3f}"
    yield from _stages(chosen)


def planned(mask: AttnMask, layout: Layout, algorithm: str = "auto") -> Exchange:
    """Dispatch and exchange of a mask."""
    sizes: dict[str, Any] = {name: getattr(layout, name) for name in ("uneven", "num_heads_q", "num_heads_kv", "head_dim")}
    dispatch = plan_dispatch(mask, layout.ranks, layout.chunk_size, algorithm, layout.hardware, **sizes)
    return plan_exchange(mask, dispatch, layout.degree)


def seconds(exchange: Exchange) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of compute and of exchange of every rank: one training step of one layer, forward and backward."""
    cost = exchange.dispatch.cost
    return cost.compute_seconds(np.array(exchange.dispatch.areas)), cost.exchange_seconds(exchange.moved)


def _summary(name: str, exchange: Exchange) -> str:
    compute, travel = (float(part.max()) * 1e3 for part in seconds(exchange))
    step = exchange.dispatch.predicted_s * 1e3
    figures = f"{exchange.dispatch.balance:>9.3f}{sum(exchange.received_rows):>16,}{exchange.share_of_all_gather:>15.3f}"
    return f"{name:<12}{figures}{compute:>12.3f}{travel:>13.3f}{step:>9.3f}"


def _stages(exchange: Exchange) -> Iterator[str]:
    """Of every stage the largest rank's compute; the host's part first."""
    cost, plans = exchange.dispatch.cost, list(exchange.ranks)
    yield ""
    yield f"{'stage':<8}{'rows (most)':>12}{'compute ms (most)':>20}"
    yield f"{'host':<8}{'-':>12}{_most(cost.cell_s * sum(b.area for b in plan.host) for plan in plans):>20.3f}"
    for index in range(exchange.degree):
        received = max(sum(plan.stages[index].receive_splits) for plan in plans)
        compute = _most(cost.cell_s * sum(b.area for b in plan.stages[index].bands) for plan in plans)
        yield f"{index + 1:<8}{received:>12,}{compute:>20.3f}"


def _most(values: Iterator[float]) -> float:
    return max(values) * 1e3


def picture(mask: AttnMask, dispatch: Dispatch, path: Path) -> None:
    """Write a PNG: keys to the right, queries down, a cell in the colour of its query's rank. Raises `UserError` where it cannot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    image = owners_of_cells(mask, dispatch, min(PIXELS, mask.total_seqlen_q))
    figure, axes = pyplot.subplots(figsize=(8, 8.6), dpi=120)
    colours = pyplot.get_cmap("tab10" if dispatch.num_ranks <= 10 else "turbo", dispatch.num_ranks)
    extent = (0, mask.total_seqlen_k, mask.total_seqlen_q, 0)
    axes.imshow(np.ma.masked_less(image, 0), cmap=colours, vmin=-0.5, vmax=dispatch.num_ranks - 0.5, extent=extent, interpolation="nearest")
    axes.set(xlabel="key row", ylabel="query row", title=f"balance {dispatch.balance:.3f} over {dispatch.num_ranks} ranks")
    if dispatch.num_ranks <= 16:
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours(rank)) for rank in range(dispatch.num_ranks)]
        axes.legend(
            handles, [f"rank {rank}" for rank in range(dispatch.num_ranks)], ncols=8, loc="upper center", bbox_to_anchor=(0.5, -0.08)
        )
    try:
        figure.savefig(path, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise UserError(f"--picture {path} cannot be written ({error}): give a .png file in a writable folder") from error
    finally:
        pyplot.close(figure)


def owners_of_cells(mask: AttnMask, dispatch: Dispatch, pixels: int) -> np.ndarray:
    """`[pixels, pixels]`: the rank of the cell in the middle of each pixel, -1 where the mask has none."""
    rows = (np.arange(pixels) * 2 + 1) * mask.total_seqlen_q // (2 * pixels)
    columns = (np.arange(pixels) * 2 + 1) * mask.total_seqlen_k // (2 * pixels)
    image = np.full((pixels, pixels), -1)
    owner = dispatch.owners[rows // dispatch.chunk_size]
    for band in mask.bands:
        (first, last), (left, right) = (
            np.searchsorted(rows, (band.q_start, band.q_end)),
            np.searchsorted(columns, (band.k_start, band.k_end)),
        )
        distance = columns[None, left:right] - rows[first:last, None]
        inside = (distance >= band.lo) & (distance <= band.hi)
        image[first:last, left:right] = np.where(inside, owner[first:last, None], image[first:last, left:right])
    return image
