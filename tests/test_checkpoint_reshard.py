"""Checkpoints written by some ranks under one plan and read by others under another, with real FSDP2 and DTensor storage."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from procs import run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from seqloom.checkpoint import group
from seqloom.checkpoint.manifest import Manifest
from seqloom.checkpoint.merge import merge
from seqloom.checkpoint.read import find_checkpoint, load_checkpoint
from seqloom.checkpoint.slices import local_boxes, local_tensor
from seqloom.checkpoint.tensorfile import TensorFileWriter
from seqloom.checkpoint.write import save_checkpoint
from seqloom.errors import UserError

SHAPES = {"embed": (13, 4), "q": (7, 6), "o": (6, 9), "norm": (5,), "one": (1, 3), "even": (8, 8)}
TP_PLACEMENTS = {"embed": Shard(0), "q": Shard(0), "o": Shard(1), "norm": Replicate(), "even": Shard(0)}  # "one" is plain on tp
MOMENTS = {"exp_avg": 2, "exp_avg_sq": 0.25}
STATE = {"plan": "any", "data": {"epoch": 1, "row": 12345}, "rng": ["AAEC"] * 8, "lr": 1e-5, "tokens": 10**12}
# name -> (ranks, mesh shape, mesh names)
PLANS = {
    "one": (1, (1, 1), ("dp", "tp")),
    "fsdp2": (2, (2, 1), ("dp", "tp")),
    "tp2": (2, (1, 2), ("dp", "tp")),
    "fsdp2_tp2": (4, (2, 2), ("dp", "tp")),
    "fsdp3": (3, (3, 1), ("dp", "tp")),
    "fsdp3_tp2": (6, (3, 2), ("dp", "tp")),
    "zero0": (2, (2, 1), ("replicate", "shard")),
    "fsdp4_tp2": (8, (4, 2), ("dp", "tp")),
    "hsdp_tp": (4, (2, 1, 2), ("replicate", "shard", "tp")),
}
CHAINS = {
    "plans": ("fsdp2_tp2", "fsdp3", "tp2", "fsdp3_tp2", "one", "hsdp_tp", "zero0"),
    "1, 2, 4, 8 and 3 ranks": ("one", "fsdp2", "fsdp2_tp2", "fsdp4_tp2", "fsdp3"),
}


def _full(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _state(plan, seed):
    """Parameters as fully_shard leaves them, two moments made from each, and a step count: names as the trainer gives them."""
    _, shape, names = PLANS[plan]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    module = nn.Module()
    for name, tensor in _full(seed).items():
        if "tp" in names and mesh["tp"].size() > 1 and name in TP_PLACEMENTS:
            tensor = distribute_tensor(tensor, mesh["tp"], [TP_PLACEMENTS[name]])
        module.register_parameter(name, nn.Parameter(tensor))
    fully_shard(module, mesh=mesh[("replicate", "shard")] if "replicate" in names else mesh["dp"])
    tensors = {f"model.{name}": parameter for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        for state, factor in MOMENTS.items():
            moment = torch.zeros_like(parameter.detach())
            moment.to_local().copy_(parameter.detach().to_local() * factor)
            tensors[f"optimizer.{state}.{name}"] = moment
        tensors[f"optimizer.step.{name}"] = torch.tensor(float(seed))
    return tensors


def _differing(tensors, expected):
    return [name for name in expected if not torch.equal(local_tensor(tensors[name]), local_tensor(expected[name]))]


def _hop(rank, world_size, plan, source, run, step):
    """Load `source` (or start from the right values), compare every local tensor with a fresh sharding of them, save as `step`."""
    expected = _state(plan, 0)
    tensors = expected
    if source is not None:
        tensors = _state(plan, 1)
        assert len(_differing(tensors, expected)) > len(SHAPES)
        assert load_checkpoint(Path(source), tensors) == STATE | {"step": step - 1}
    differing = _differing(tensors, expected)
    folder = save_checkpoint(Path(run), step, tensors, STATE | {"step": step})
    assert find_checkpoint("last", Path(run)) == folder
    return differing


def _digest(tensors, state):
    """Of every byte of the full state, under its names, and of the training state but for the step."""
    found = hashlib.sha256(json.dumps({**state, "step": None}, sort_keys=True).encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].numpy().tobytes())
    return found.hexdigest()


def _stored_digest(folder):
    tensors = {name: torch.zeros(entry.info.shape) for name, entry in Manifest.read(folder).tensors.items()}
    return _digest(tensors, load_checkpoint(folder, tensors))


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
def test_a_chain_of_plans_changes_nothing(tmp_path, chain):
    full = _full(0)
    whole = {f"model.{n}": t for n, t in full.items()} | {f"optimizer.step.{n}": torch.tensor(0.0) for n in full}
    whole |= {f"optimizer.{state}.{n}": t * factor for state, factor in MOMENTS.items() for n, t in full.items()}
    source = None
    for step, plan in enumerate(chain):
        differing = run_ranks(_hop, PLANS[plan][0], plan, source, str(tmp_path), step)
        assert differing == [[]] * PLANS[plan][0], plan
        source = str(tmp_path / f"step-{step}")
        assert _stored_digest(Path(source)) == _digest(whole, STATE), plan
        manifest = Manifest.read(Path(source))
        for name, entry in manifest.tensors.items():
            assert sum(piece.box.numel for piece in entry.pieces) * 4 == entry.info.nbytes, (plan, name)
        stored = sum(file.nbytes for file in manifest.files.values())
        assert stored < 2 * sum(entry.info.nbytes for entry in manifest.tensors.values()) + 3000 * PLANS[plan][0]


def _load_merged(rank, world_size, plan, merged):
    tensors = _state(plan, 1)
    state = load_checkpoint(find_checkpoint(merged, Path("nowhere")), tensors)
    return state["step"], _differing(tensors, _state(plan, 0))


def test_a_merged_file_equals_the_full_tensors_and_loads_under_another_plan(tmp_path):
    run_ranks(_hop, 3, "fsdp3", None, str(tmp_path / "run"), 0)
    merge(tmp_path, output_fname=tmp_path / "merged.ckpt")
    merged = load_file(tmp_path / "merged.ckpt")
    assert all(torch.equal(merged[f"model.{name}"], tensor) for name, tensor in _full(0).items())
    assert run_ranks(_load_merged, 4, "fsdp2_tp2", str(tmp_path / "merged.ckpt")) == [(0, [])] * 4


def _boxes_against_reality(rank, world_size, shape, names):
    """Whether the local tensors of real fully_shard over real tensor parallelism are the boxes we think, for many uneven sizes."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    wrong = []
    for size in range(1, 16):
        for placement in (Shard(0), Shard(1), Replicate()):
            full = torch.arange(size * 4.0).reshape(size, 4)
            module = nn.Module()
            module.w = nn.Parameter(distribute_tensor(full, mesh["tp"], [placement]))
            fully_shard(module, mesh=mesh["dp"])
            local = local_tensor(module.w)
            copy = torch.full_like(local, -1)
            for box in local_boxes(module.w):
                box.place.narrow(copy).copy_(box.part.narrow(full))
            if not torch.equal(copy, local):
                wrong.append((size, placement))
    return wrong


def test_boxes_are_what_fully_shard_makes():
    assert run_ranks(_boxes_against_reality, 6, (3, 2), ("dp", "tp")) == [[]] * 6


DTENSOR_PLACEMENTS = [
    (Shard(0), Shard(0)),
    (Shard(1), Shard(0)),
    (Shard(0), Replicate()),
    (Replicate(), Shard(1)),
    (Replicate(), Replicate()),
]


def _plain_dtensors(rank, world_size, folder):
    """DTensors without FSDP on a 2-D mesh, and a plain tensor: saved, compared with full_tensor, loaded under rotated placements."""
    mesh = init_device_mesh("cpu", (2, 2))
    full = {str(i): torch.arange(7 * 5.0).reshape(7, 5) + 100 * i for i in range(len(DTENSOR_PLACEMENTS))}
    written = {name: distribute_tensor(t, mesh, DTENSOR_PLACEMENTS[int(name)]) for name, t in full.items()} | {"plain": torch.ones(3)}
    assert all(torch.equal(written[name].full_tensor(), tensor) for name, tensor in full.items())
    path = save_checkpoint(Path(folder), 1, written, {})
    rotated = {n: distribute_tensor(torch.zeros(7, 5), mesh, DTENSOR_PLACEMENTS[int(n) - 1]) for n in full} | {"plain": torch.zeros(3)}
    load_checkpoint(path, rotated)
    return [name for name, tensor in full.items() if not torch.equal(rotated[name].full_tensor(), tensor)]


def test_dtensors_without_fsdp(tmp_path):
    assert run_ranks(_plain_dtensors, 4, str(tmp_path)) == [[]] * 4
    manifest = Manifest.read(tmp_path / "step-1")
    writers = {piece.file for entry in manifest.tensors.values() for piece in entry.pieces}
    assert len(writers) == 4
    assert manifest.tensors["plain"].pieces[0].file == "shard-00000.safetensors"
    assert len(manifest.tensors["4"].pieces) == 1


def _adamw(rank, world_size, folder, plan, load):
    """A real AdamW step under FSDP2; the state goes through a checkpoint and comes back bitwise."""
    tensors = _state(plan, 3)
    parameters = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter) if load else parameter.detach() * 0.5
    optimizer.step()
    state = {f"model.{n}": p for n, p in parameters.items()}
    state |= {f"optimizer.{key}.{n}": value for n, p in parameters.items() for key, value in optimizer.state[p].items()}
    if load:
        load_checkpoint(Path(folder) / "step-1", state)
    else:
        save_checkpoint(Path(folder), 1, state, {})
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().numpy().tobytes() for n, t in state.items()}


def test_optimizer_state_comes_back_bitwise_under_another_plan(tmp_path):
    written = run_ranks(_adamw, 4, str(tmp_path), "fsdp2_tp2", False)
    read = run_ranks(_adamw, 3, str(tmp_path), "fsdp3", True)
    assert all(answer == written[0] for answer in written + read)
    assert {name.split(".")[1] for name in read[0] if name.startswith("optimizer.")} == {"step", "exp_avg", "exp_avg_sq"}


# ---- failures reach all ranks


def _sentence(action):
    try:
        action()
    except UserError as error:
        return str(error)
    except Exception as error:
        return repr(error)
    return None


def _failing_write(rank, world_size, folder, kind):
    if rank == 1:

        def fail(self, tensor):
            raise OSError(5, "Input/output error") if kind == "system" else ValueError("a defect")

        TensorFileWriter.append = fail
    return _sentence(lambda: save_checkpoint(Path(folder), 2, _state("fsdp2", 0), {}))


@pytest.mark.parametrize("kind", ["system", "defect"])
def test_a_failed_write_is_an_error_on_all_ranks(tmp_path, kind):
    first, second = run_ranks(_failing_write, 2, str(tmp_path), kind)
    assert "saving step 2" in first
    assert "failed on rank 1" in first
    assert second == ("ValueError('a defect')" if kind == "defect" else first)
    assert list(tmp_path.iterdir()) == []


def _load_damaged(rank, world_size, folder):
    """Save on all ranks, damage one file in several ways, and try to load each time: the sentences, and which tensors were then spoiled."""
    tensors = _state("fsdp2", 1)
    run = Path(folder)
    path = save_checkpoint(run, 1, _state("fsdp2", 0), {}) / "shard-00001.safetensors"
    good = path.read_bytes()
    answers, spoiled = [], []
    for position in (0, 100, len(good) - 1, None):
        dist.barrier()
        if rank == 0 and position is None:
            path.unlink()
        elif rank == 0:
            path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        dist.barrier()
        answers.append(_sentence(lambda: load_checkpoint(path.parent, tensors)))
        spoiled.append({bool(local_tensor(tensor).isnan().all()) for tensor in tensors.values() if local_tensor(tensor).numel()})
        for tensor in tensors.values():
            local_tensor(tensor).zero_()
    return answers, spoiled


def test_damage_is_reported_on_all_ranks_and_leaves_nothing_to_go_on_from(tmp_path):
    first, second = run_ranks(_load_damaged, 2, str(tmp_path))
    assert first[0] == second[0]
    assert ["shard-00001.safetensors from byte 0 has digest" in sentence for sentence in first[0]] == [True, True, True, False]
    assert "shard-00001.safetensors is missing" in first[0][3]
    assert first[1] == second[1] == [{True}, {True}, {True}, {False}]


def _mismatch_on_one(rank, world_size, folder):
    tensors = {"a": torch.zeros(3) if rank == 0 else torch.zeros(4), "b": torch.zeros(2)}
    return [
        _sentence(lambda: load_checkpoint(Path(folder), tensors)),
        _sentence(lambda: save_checkpoint(Path(folder).parent, 2, tensors, {})),
        _sentence(lambda: group.attempt("testing", lambda: rank)),
    ]


def test_a_mismatch_on_one_rank_is_an_error_on_all(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {"a": torch.ones(3), "b": torch.ones(2)}, {})
    first, second = run_ranks(_mismatch_on_one, 2, str(folder))
    assert first == second
    assert "a (stored (3,) torch.float32, wanted (4,) torch.float32)" in first[0]
    assert "cannot save a: rank 1 has" in first[1]
    assert first[2] is None


def _own_tensors(rank, world_size, folder, step):
    """Each rank has tensors of its own, as pipeline stages do; reading with the ranks exchanged needs all of them together."""
    if step == 1:
        save_checkpoint(Path(folder), 1, {f"stage{rank}": torch.full((3,), float(rank)), "shared": torch.ones(2)}, {})
        return None
    tensors = {f"stage{1 - rank}": torch.zeros(3), "shared": torch.zeros(2)}
    load_checkpoint(Path(folder) / "step-1", tensors)
    return tensors[f"stage{1 - rank}"].tolist()


def test_ranks_may_hold_different_tensors(tmp_path):
    run_ranks(_own_tensors, 2, str(tmp_path), 1)
    assert run_ranks(_own_tensors, 2, str(tmp_path), 2) == [[1.0] * 3, [0.0] * 3]
    document = json.loads((tmp_path / "step-1" / "manifest.json").read_text())
    assert document["world_size"] == 2
    assert len(document["tensors"]["shared"]["pieces"]) == 1
