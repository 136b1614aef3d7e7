"""Storage over any subset of the axes that sum gradients, ZeRO 2: the same steps, each gradient summed once, each element saved once."""

import itertools
from collections import Counter
from math import prod
from pathlib import Path

import mlp_lm
import pytest
import torch
from handwritten import CPU, SETTINGS, check_training, filled, variant
from procs import run_ranks
from torch.distributed.tensor import Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from seqloom.checkpoint.manifest import Manifest
from seqloom.checkpoint.read import load_checkpoint
from seqloom.checkpoint.slices import local_tensor
from seqloom.checkpoint.write import save_checkpoint
from seqloom.runtime.mesh import build_mesh
from seqloom.runtime.optimizer import build_optimizer, model_and_optimizer_tensors
from seqloom.runtime.step import TrainStep, accumulate_gradients

TWO_SUMS = {
    "INPUTS": dict.fromkeys(("input_ids", "labels"), ("dp_shard", "sp")),
    "LOSS_PARTIAL": ("dp_shard", "sp"),
    "SUM_GRADS": ("dp_shard", "sp"),
}
# name of the case -> program, plan mesh, scale units, changed constants
JOBS = {
    "sp x dp": ("sp", {"sp": 2}, 2, {}),
    "sp, tp": ("mixed", {"sp": 2, "tp": 2}, 1, {}),
    "tp, sp": ("mixed", {"tp": 2, "sp": 2}, 1, {}),
    "tp x dp": ("mixed", {"sp": 1, "tp": 2}, 2, {}),
    "dp_shard, sp": ("sp", {"dp_shard": 2, "sp": 2}, 1, TWO_SUMS),
    "dp alone": ("sp", {"sp": 1}, 2, {}),
    "sp alone": ("sp", {"sp": 2}, 1, {}),
    "sp, tp x dp": ("mixed", {"sp": 2, "tp": 2}, 2, {}),
    "tp, sp x dp": ("mixed", {"tp": 2, "sp": 2}, 2, {}),
    "sp x dp, tied": ("tp", {"tp": 2}, 2, {}),
}


def subsets(axes):
    """Every choice of axes, the largest first."""
    return [chosen for count in range(len(axes), -1, -1) for chosen in itertools.combinations(axes, count)]


def made(folder, job, zero, sharded):
    """The program of a job with its storage, and the mesh."""
    name, plan_mesh, dp, changes = JOBS[job]
    program = variant(folder, name, MESH=plan_mesh, ZERO=zero, SHARDED=sharded, **changes)
    return program, build_mesh(plan_mesh, dp, "cpu")


def summing_axes(job):
    """The axes of a job's mesh that sum gradients and have more than one rank."""
    name, plan_mesh, dp, changes = JOBS[job]
    sums = changes.get("SUM_GRADS", () if name == "tp" else ("sp",))
    return [axis for axis, size in {"dp": dp, **plan_mesh}.items() if size > 1 and axis in ("dp", *sums)]


def _parity(rank, world_size, folder, job, zeros, choices):
    name, _, dp, _ = JOBS[job]
    for number, (zero, sharded) in enumerate(itertools.product(zeros, choices)):
        program, mesh = made(f"{folder}/{rank}/{number}", job, zero, sharded)
        check_training(program, mesh, dp, name == "tp", 2, 2, f"{job} zero {zero} over {sharded}")


@pytest.mark.parametrize("job", [name for name in JOBS if ", tp x dp" not in name and ", sp x dp" not in name])
def test_any_storage_gives_the_steps_of_the_plain_model(tmp_path, job):
    world_size = prod(JOBS[job][1].values()) * JOBS[job][2]
    run_ranks(_parity, world_size, str(tmp_path), job, (2, 3), subsets(summing_axes(job)))


def test_zero_1_and_shards_of_one_rank(tmp_path):
    run_ranks(_parity, 4, str(tmp_path), "sp x dp", (1,), [("dp",), ("sp",)])
    run_ranks(_parity, 4, str(tmp_path), "sp, tp", (1, 3), [("dp",)])


@pytest.mark.parametrize("job", ["sp, tp x dp", "tp, sp x dp"])
def test_replicas_shards_and_split_weights_at_once(tmp_path, job):
    run_ranks(_parity, 8, str(tmp_path), job, (2, 3), [("dp",), ("sp",)])


def _placed(rank, world_size, folder):
    """(placements, local elements of the embedding and of a split weight) per choice."""
    found = {}
    for job, sharded in [("sp x dp", ("dp",)), ("sp x dp", ("sp",)), ("sp x dp", ("dp", "sp")), ("sp x dp", ()), ("sp, tp", ("dp",))]:
        program, mesh = made(f"{folder}/{rank}/{job}/{'-'.join(sharded)}", job, 3, sharded)
        model = filled(program, mesh, mlp_lm.build().state_dict())
        embed, up = model.embed.weight, model.layers[0].up.weight
        whole = mlp_lm.build().state_dict()
        assert torch.equal(embed.full_tensor(), whole["embed.weight"]) and torch.equal(up.full_tensor(), whole["layers.0.up.weight"])
        found[job, sharded] = [(p.placements, tuple(p.device_mesh.shape), tuple(local_tensor(p).shape)) for p in (embed, up)]
    return found


def test_each_rank_stores_its_shard_and_no_more(tmp_path):
    ranks = run_ranks(_placed, 4, str(tmp_path))
    hybrid, flat = (Replicate(), Shard(0)), (Shard(0),)
    for rank, found in enumerate(ranks):
        dp, sp = divmod(rank, 2)
        rows = {0: 6, 1: 5}  # 11 rows over two ranks
        assert found["sp x dp", ("dp",)] == [(hybrid, (2, 2), (rows[dp], 6)), (hybrid, (2, 2), (4, 6))]
        assert found["sp x dp", ("sp",)] == [(hybrid, (2, 2), (rows[sp], 6)), (hybrid, (2, 2), (4, 6))]
        assert found["sp x dp", ("dp", "sp")] == [(flat, (4,), (2 if rank == 3 else 3, 6)), (flat, (4,), (2, 6))]
        assert found["sp x dp", ()] == [(hybrid, (4, 1), (11, 6)), (hybrid, (4, 1), (8, 6))]
        embed, up = found["sp, tp", ("dp",)]
        assert embed == (hybrid, (2, 1), (11, 6))
        assert up[1:] == ((2, 1, 2), (4, 6))


class Collectives(TorchDispatchMode):
    """Counts the collectives that FSDP2 starts; the program's own are functional ones."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func._schema.name.removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


GROUPS = 3  # two layers and the rest


def _counted(rank, world_size, folder):
    found = {}
    for zero, sharded in [(1, ("sp",)), (2, ("sp",)), (3, ("sp",)), (2, ("dp", "sp")), (3, ("dp", "sp")), (0, ())]:
        program, mesh = made(f"{folder}/{rank}/{zero}{len(sharded)}", "sp x dp", zero, sharded)
        model = filled(program, mesh, mlp_lm.build().state_dict())
        for micro in (1, 4):
            model.zero_grad()
            with Collectives() as seen:
                accumulate_gradients(model, program, mesh, [mlp_lm.batch(i) for i in range(micro)], CPU)
            seen.counts["allreduce_"] -= 1  # the count of tokens
            found[zero, sharded, micro] = tuple(seen.counts[n] for n in ("_allgather_base_", "_reduce_scatter_base_", "allreduce_"))
    return found


def test_what_communicates_at_every_micro_batch_and_what_once(tmp_path):
    """Gathers, reduce-scatters, reductions over replicas, in one and in four micro-batches."""
    for found in run_ranks(_counted, 4, str(tmp_path)):
        for sharded, replicas in ((("sp",), GROUPS), (("dp", "sp"), 0)):
            assert found[2, sharded, 1] == (GROUPS, GROUPS, replicas)
            assert found[2, sharded, 4] == (GROUPS, 4 * GROUPS, replicas)
            layers = GROUPS - 1
            assert found[3, sharded, 1][1:] == (GROUPS, replicas)
            assert found[3, sharded, 4][1:] == (4 * GROUPS, replicas)
            assert found[3, sharded, 4][0] == 4 * found[3, sharded, 1][0]
            assert GROUPS + layers - 1 <= found[3, sharded, 1][0] <= GROUPS + layers  # the backward may find the last layer gathered
        assert found[1, ("sp",), 4] == found[1, ("sp",), 1] == (GROUPS, GROUPS, GROUPS)
        assert found[0, (), 4][2] == found[0, (), 1][2] == GROUPS


STORED = [("sp, tp x dp", ("dp",)), ("tp, sp x dp", ("sp",)), ("sp, tp x dp", ("dp", "sp"))]


def _trained(folder, job, sharded, steps):
    program, mesh = made(folder, job, 3, sharded)
    model = filled(program, mesh, mlp_lm.build().state_dict())
    optimizer = build_optimizer(model, **SETTINGS)
    step = TrainStep(model, program, mesh, optimizer, CPU, None)
    for number in range(steps):
        step([mlp_lm.batch(10 * number + mesh.get_local_rank("dp"))])
    return model_and_optimizer_tensors(model, optimizer, initialize=True)


def _saved_and_loaded(rank, world_size, folder):
    """Each storage saves the same training state, and each reads what the one before it saved."""
    whole = []
    for number, (job, sharded) in enumerate(STORED):
        expected = _trained(f"{folder}/{rank}/{number}", job, sharded, 2)
        if number:
            tensors = _trained(f"{folder}/{rank}/{number}-loaded", job, sharded, 0)
            load_checkpoint(Path(folder) / "run" / f"step-{number - 1}", tensors)
            for name, tensor in tensors.items():
                torch.testing.assert_close(local_tensor(tensor), local_tensor(expected[name]), rtol=1e-12, atol=1e-12, msg=name)
            expected = tensors  # saved again as it was read, to the bit
        save_checkpoint(Path(folder) / "run", number, expected, {"step": number})
        whole.append({n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().tolist() for n, t in expected.items()})
    return whole


def test_checkpoints_hold_each_element_once_and_load_under_another_storage(tmp_path):
    ranks = run_ranks(_saved_and_loaded, 8, str(tmp_path))
    assert all(found == ranks[0] for found in ranks)
    assert ranks[0][0] == ranks[0][1] == ranks[0][2]
    for number in range(len(STORED)):
        manifest = Manifest.read(tmp_path / "run" / f"step-{number}")
        for name, entry in manifest.tensors.items():
            assert sum(piece.box.numel for piece in entry.pieces) == prod(entry.info.shape), (number, name)
