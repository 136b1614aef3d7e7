"""Keys: a mask, how its rows lie on the ranks of a group, and everything that follows from that, planned once and kept.

Role: users make a key per mask (`make_key`) and pass it to `dispatch`, `undispatch`, `roll` and `calc_attn`. A key is frozen, hashable and
the same on every rank of the group, because planning needs nothing but the mask and the number of ranks. A key keeps its exchange plan once
made, and the keys of layers with a window (`within`). `runtime_of` gives the rank's part on a device; the latest `KEPT` are remembered.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import DeviceMesh, ProcessGroup

from seqloom.errors import UserError
from seqloom.magi.attention import Runtime, Stage
from seqloom.magi.choose import choose_kernel, in_many_pieces
from seqloom.magi.dispatch import Dispatch, plan_dispatch
from seqloom.magi.exchange import Exchange, plan_exchange
from seqloom.magi.groupcast import Hops, NodeGroups, route
from seqloom.magi.mask import AttnMask
from seqloom.magi.nodes import node_stages
from seqloom.magi.windows import cut_to_window
from seqloom.ops.transfer import to_device

KEPT = 64  # runtimes and plans remembered: a few batches ahead, several masks each

Degree = int | Literal["auto"]


@dataclass(frozen=True)
class DistAttnRuntimeKey:
    """A mask over the ranks of a group: `group` None is this process alone. Heads and `head_dim` are those of the tensors to come, None
    where they were not told. With `nodes` rows travel in two hops.
    """

    mask: AttnMask
    dispatch: Dispatch
    num_heads_q: int | None
    num_heads_kv: int | None
    head_dim: int | None
    group: ProcessGroup | None
    degree: Degree
    kernel: str | None
    deterministic: bool = False
    nodes: NodeGroups | None = None

    @property
    def total_seqlen(self) -> int:
        """Rows of the whole sequence, without padding."""
        return self.mask.total_seqlen_q

    @property
    def rank(self) -> int:
        """This process in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def local_rows(self) -> int:
        """Rows on this rank, padding included."""
        return len(self.dispatch.position_ids(self.rank))

    @cached_property
    def exchange(self) -> Exchange:
        """The exchange plan, this rank's part of it made: numbers on the host. No rank asks another, so a thread may read it ahead."""
        exchange = plan_exchange(self.mask, self.dispatch, degree=max(self.degree, 1) if self.degree != "auto" else "auto")
        exchange.ranks[self.rank]
        return exchange

    def within(self, window: int | None) -> DistAttnRuntimeKey:
        """The key of layers that see no further than `window` rows, on the same dispatch; None: this key.

        Raises `UserError` for a window below 1, and where nothing of the mask is within it.
        """
        if window is None:
            return self
        if window not in self._windowed:
            mask = cut_to_window(self.mask, window)
            self._windowed[window] = self if mask is self.mask else replace(self, mask=mask)
        return self._windowed[window]

    @cached_property
    def _windowed(self) -> dict[int, DistAttnRuntimeKey]:
        return {}


def group_of(cp_group_or_mesh: ProcessGroup | DeviceMesh | None) -> ProcessGroup | None:
    """The process group of a group or mesh (both its dimensions together); None where it has one rank.

    Raises `UserError` for a group that this process is not in, and for a mesh that `nodes_of` refuses.
    """
    group = cp_group_or_mesh
    if isinstance(group, DeviceMesh):
        _check_mesh(group)
        group = group._flatten().get_group() if group.ndim > 1 else group.get_group()
    if group is None:
        return None
    if dist.get_rank(group) < 0:
        raise UserError("the context parallel group does not hold this process: pass the group that this rank is a member of")
    return group if group.size() > 1 else None


def nodes_of(cp_group_or_mesh: ProcessGroup | DeviceMesh | None) -> NodeGroups | None:
    """The groups across and within nodes of a mesh (nodes x ranks of a node); None where there is one node, or nodes of one rank.

    Raises `UserError` for a mesh of more dimensions, and for one whose ranks are not numbered node by node.
    """
    mesh = cp_group_or_mesh
    if not isinstance(mesh, DeviceMesh) or mesh.ndim == 1:
        return None
    _check_mesh(mesh)
    return None if 1 in mesh.shape else NodeGroups(mesh.get_group(0), mesh.get_group(1))


def _check_mesh(mesh: DeviceMesh) -> None:
    ranks = mesh.mesh.flatten().tolist()
    if mesh.ndim > 2:
        raise UserError(f"a context parallel mesh has one dimension, or two (nodes x ranks of a node), not {mesh.ndim}: slice it")
    if ranks != sorted(ranks):
        raise UserError(f"the context parallel mesh has ranks in the order {ranks}: number them node by node, in rising order")


def make_key(
    mask: AttnMask,
    num_heads_q: int | None,
    num_heads_kv: int | None,
    head_dim: int | None,
    group: ProcessGroup | None,
    *,
    chunk_size: int | None = None,
    algorithm: str = "auto",
    uneven: bool = False,
    degree: Degree = 1,
    kernel: str | None = None,
    dispatch: Dispatch | None = None,
    current: bool = True,
    deterministic: bool = False,
    nodes: NodeGroups | None = None,
) -> DistAttnRuntimeKey:
    """The key of a mask on a group; with `dispatch` the rows lie as an earlier key laid them. Without `current` it waits for `use_key`.

    Raises `UserError` for heads that do not share evenly, a mask whose queries and keys are not the same rows, a degree below 0, and a
    dispatch of another length or number of ranks.
    """
    if num_heads_q is not None and num_heads_kv is not None and (min(num_heads_q, num_heads_kv) < 1 or num_heads_q % num_heads_kv):
        raise UserError(f"{num_heads_q} query heads cannot share {num_heads_kv} key/value heads evenly: use a multiple")
    if mask.total_seqlen_q != mask.total_seqlen_k:
        raise UserError(
            f"queries and keys of one sequence are needed, not {mask.total_seqlen_q} and {mask.total_seqlen_k} rows: use equal totals"
        )
    if degree != "auto" and degree < 0:
        raise UserError(f"degree {degree} is no number of stages: use 0 (blocking), 1 or more, or 'auto'")
    ranks = 1 if group is None else group.size()
    if dispatch is None:
        dispatch = _dispatch(mask, ranks, chunk_size, algorithm, uneven, num_heads_q, num_heads_kv, head_dim)
    elif (dispatch.total_seqlen, dispatch.num_ranks) != (mask.total_seqlen_q, ranks):
        raise UserError(
            f"the dispatch is of {dispatch.total_seqlen} rows over {dispatch.num_ranks} ranks, the new mask of {mask.total_seqlen_q} over "
            f"{ranks}: use a mask of the same length on the same group"
        )
    key = DistAttnRuntimeKey(mask, dispatch, num_heads_q, num_heads_kv, head_dim, group, degree, kernel, deterministic, nodes)
    if current:
        use_key(key)
    return key


def use_key(key: DistAttnRuntimeKey) -> None:
    """Make a key the most recent one of its group: what runs next attends by it."""
    _latest[key.group] = key
    _latest.move_to_end(key.group)
    while len(_latest) > KEPT:
        _latest.popitem(last=False)


_latest: OrderedDict[ProcessGroup | None, DistAttnRuntimeKey] = OrderedDict()


def most_recent_key(group: ProcessGroup | None) -> DistAttnRuntimeKey:
    """The key made last for a group. Raises `UserError` where there is none."""
    if group not in _latest:
        raise UserError("no key was made for this group yet: make one with magi_attn_flex_key or magi_attn_varlen_key first")
    return _latest[group]


def latest_key() -> DistAttnRuntimeKey:
    """The key made last, for whatever group. Raises `UserError` where there is none."""
    if not _latest:
        raise UserError("no key was made yet: make one with magi_attn_flex_key or magi_attn_varlen_key before the model runs")
    return next(reversed(_latest.values()))


@functools.lru_cache(maxsize=KEPT)
def _dispatch(
    mask: AttnMask,
    ranks: int,
    chunk_size: int | None,
    algorithm: str,
    uneven: bool,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
) -> Dispatch:
    sizes = {"num_heads_q": heads, "num_heads_kv": kv_heads, "head_dim": head_dim}
    known = {name: size for name, size in sizes.items() if size is not None}
    return plan_dispatch(mask, ranks, chunk_size, algorithm, uneven=uneven, **known)


@functools.lru_cache(maxsize=KEPT)
def runtime_of(key: DistAttnRuntimeKey, device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool) -> Runtime:
    """This rank's part of a key on a device: index tensors, bands, kernel."""
    plan = key.exchange.ranks[key.rank]
    stages = _stages(key, key.exchange, device)
    bands = [band for bands in (plan.host, *(stage.bands for stage in stages)) for band in bands]
    many = device.type == "cuda" and in_many_pieces(bands)
    kernel = choose_kernel(key.kernel, device, dtype, head_dim, softcap, key.deterministic, many)
    return Runtime(plan.rows, tuple(plan.host), stages, kernel, key.nodes or key.group, key.degree == 0, key.deterministic)


def _stages(key: DistAttnRuntimeKey, exchange: Exchange, device: torch.device) -> tuple[Stage, ...]:
    """The rank's stages; with `nodes` in two hops."""
    if key.group is None:
        return ()
    if key.nodes is None:
        return tuple(Stage(route(stage.send, stage.receive_splits, device), stage.bands) for stage in exchange.ranks[key.rank].stages)
    rows = exchange.dispatch.rows(key.rank)
    stages = []
    for stage in node_stages(exchange, key.rank, key.nodes.within.size()):
        across, within = (route(hop.send, hop.receive_splits, device) for hop in (stage.across, stage.within))
        stages.append(Stage(Hops(rows, across, within), stage.bands))
    return tuple(stages)


@functools.lru_cache(maxsize=KEPT)
def global_rows(key: DistAttnRuntimeKey, device: torch.device) -> torch.Tensor:
    """Global row of every local row of this rank, int64; those of the padding are `total_seqlen` or more."""
    return to_device(torch.from_numpy(np.ascontiguousarray(key.dispatch.position_ids(key.rank), dtype=np.int64)), device)


@functools.lru_cache(maxsize=KEPT)
def places(key: DistAttnRuntimeKey, device: torch.device) -> torch.Tensor:
    """For every global row (padding excluded) its place in the concatenation of all ranks' rows, each padded to the longest."""
    longest = longest_rows(key)
    place = np.empty(key.dispatch.padded_seqlen, dtype=np.int64)
    for rank in range(key.dispatch.num_ranks):
        rows = key.dispatch.position_ids(rank)
        place[rows] = rank * longest + np.arange(len(rows))
    return to_device(torch.from_numpy(place[: key.total_seqlen]), device)


def longest_rows(key: DistAttnRuntimeKey) -> int:
    """Rows of the rank that has most."""
    return max(len(key.dispatch.position_ids(rank)) for rank in range(key.dispatch.num_ranks))
