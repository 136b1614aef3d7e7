"""Steps of hand-written programs equal those of the plain model in one process: loss, norm, every gradient, five AdamW steps, in fp64."""

import itertools

import mlp_lm
import pytest
import torch
import torch.distributed as dist
from handwritten import CLIP, CPU, SETTINGS, check_gradients, check_training, close, filled, reference_steps, variant
from procs import run_ranks
from torch.distributed.tensor import DTensor

from seqloom.checkpoint.slices import local_tensor
from seqloom.errors import UserError
from seqloom.runtime import offload
from seqloom.runtime.compiled import compile_blocks
from seqloom.runtime.materialize import storage
from seqloom.runtime.mesh import build_mesh
from seqloom.runtime.optimizer import build_optimizer, model_and_optimizer_tensors
from seqloom.runtime.step import TrainStep, accumulate_gradients, count_tokens, local_inputs, reduce_loss_and_norm


def _parity(rank, world_size, folder, name, plan_mesh, dp, zeros, micro_counts, edit=str):
    for zero, micro in itertools.product(zeros, micro_counts):
        program = variant(f"{folder}/{rank}/{zero}", name, edit, ZERO=zero, MESH=plan_mesh)
        mesh = build_mesh(program.MESH, dp, "cpu")
        steps = 5 if micro == 2 else 1  # one step tells enough about the plainest way of summing
        check_training(program, mesh, dp, name == "tp", micro, steps, f"{name} zero {zero} micro {micro}")


CASES = [
    ("sp", {"sp": 1}, 1),
    ("sp", {"sp": 2}, 1),
    ("sp", {"sp": 1}, 2),
    ("sp", {"sp": 2}, 2),
    ("sp", {"sp": 4}, 1),
    ("tp", {"tp": 1}, 1),
    ("tp", {"tp": 2}, 1),
    ("tp", {"tp": 1}, 2),
    ("tp", {"tp": 2}, 2),
    ("tp", {"tp": 4}, 1),
    ("mixed", {"sp": 1, "tp": 1}, 1),
    ("mixed", {"sp": 1, "tp": 2}, 1),
    ("mixed", {"sp": 2, "tp": 2}, 1),
    ("mixed", {"tp": 2, "sp": 2}, 1),
    ("mixed", {"tp": 2, "sp": 1}, 2),
]


@pytest.mark.parametrize(("name", "plan_mesh", "dp"), CASES, ids=lambda value: str(value))
def test_equals_the_plain_model(tmp_path, name, plan_mesh, dp):
    world_size = dp
    for size in plan_mesh.values():
        world_size *= size
    run_ranks(_parity, world_size, str(tmp_path), name, plan_mesh, dp, (0, 1, 2, 3), (1, 2))


def every_parameter_on_both_axes(text):
    """The program `mixed` with `sp` in PLACEMENTS in place of SUM_GRADS: DTensors on two axes, whose parts `local` names."""
    text = text.replace("import Shard", "import Replicate, Shard").replace("weight)", 'weight, partial_grad=("sp",))')
    text = text.replace("up.bias)", 'up.bias, partial_grad=("sp",))').replace('{"tp": Shard', '{"sp": Replicate(), "tp": Shard')
    whole = [f'    "{name}.weight": {{"sp": Replicate()}},\n' for name in ("embed", "norm", "head", "layers.*.norm")]
    return text.replace("PLACEMENTS = {\n", "PLACEMENTS = {\n" + "".join(whole)).replace('SUM_GRADS = ("sp",)', "SUM_GRADS = ()")


@pytest.mark.parametrize(("plan_mesh", "dp"), [({"sp": 2, "tp": 2}, 1), ({"sp": 2, "tp": 1}, 2)], ids=str)
def test_parameters_on_two_axes(tmp_path, plan_mesh, dp):
    run_ranks(_parity, 4, str(tmp_path), "mixed", plan_mesh, dp, (0, 1, 2, 3), (2,), every_parameter_on_both_axes)


def _wrong(rank, world_size, folder):
    """Forgetting that a gradient is in parts must show: the comparison is no tautology."""
    program = variant(f"{folder}/{rank}", "tp", edit=lambda text: text.replace(', partial_grad=("tp",)', ""))
    mesh = build_mesh(program.MESH, 1, "cpu")
    (expected,), _ = reference_steps(True, [[mlp_lm.batch(0)]])
    model = filled(program, mesh, mlp_lm.build(True).state_dict())
    accumulate_gradients(model, program, mesh, [mlp_lm.batch(0)], CPU)
    return [name for name, p in model.named_parameters() if not torch.allclose(p.grad.full_tensor(), expected[3][name])]


def test_a_wrong_program_is_seen(tmp_path):
    wrong = run_ranks(_wrong, 2, str(tmp_path))[0]
    assert set(wrong) == {"embed.weight", "norm.weight", "layers.0.norm.weight", "layers.1.norm.weight"}


def _dry(rank, world_size, folder):
    """Rank 5 of 8 that do not exist, on fake tensors. The mesh and the storage are made before: they need real ranks' numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    offload.MINIMUM = 0
    for name, plan_mesh, changes in (
        ("mixed", {"sp": 2, "tp": 2}, {}),
        ("mixed", {"sp": 2, "tp": 2}, {"SHARDED": ("sp",)}),
        ("tp", {"tp": 4}, {}),
        ("segments", {"sp": 4}, {"SHARDED": ("dp",), "MODES": ("offload", "tiles")}),
        ("segments", {"sp": 4}, {"MODES": ("selective", "offload")}),
    ):
        for zero in (0, 1, 2, 3) if "SHARDED" not in changes else (2, 3):
            stored = {"SHARDED": ()} if zero == 0 else {}
            program = variant(f"{folder}/{name}{zero}{len(changes)}", name, ZERO=zero, MESH=plan_mesh, **{**changes, **stored})
            mesh = build_mesh(program.MESH, 2, "cpu")
            model = storage(program, mesh, torch.float32, torch.bfloat16)
            with FakeTensorMode(allow_non_fake_inputs=True):
                model.to_empty(device="cpu")
                batch = {key: torch.empty(shape, dtype=torch.int64) for key, shape in program.SHAPES.items()}
                result = TrainStep(model, program, mesh, build_optimizer(model, **SETTINGS), CPU, CLIP)([batch, batch])
                assert result.loss.shape == result.grad_norm.shape == result.tokens.shape == ()


def test_a_rank_runs_dry_on_fake_tensors(tmp_path):
    run_ranks(_dry, 1, str(tmp_path))


def _compiled(rank, world_size, folder):
    program = variant(f"{folder}/{rank}", "mixed")
    mesh = build_mesh(program.MESH, 1, "cpu")
    (expected,), _ = reference_steps(False, [[mlp_lm.batch(0)]])
    model = filled(program, mesh, mlp_lm.build().state_dict())
    compile_blocks(model, program, "aot_eager")
    check_gradients(model, program, mesh, [mlp_lm.batch(0)], expected, "compiled")


def test_compiled_blocks_with_recompute_give_the_same(tmp_path):
    run_ranks(_compiled, 4, str(tmp_path))


def _mixed_precision(rank, world_size, folder):
    for name, plan_mesh, dp, zero in [("sp", {"sp": 2}, 1, 3), ("tp", {"tp": 2}, 1, 1), ("sp", {"sp": 1}, 2, 0)]:
        program = variant(f"{folder}/{rank}/{name}{zero}", name, ZERO=zero, MESH=plan_mesh)
        mesh = build_mesh(program.MESH, dp, "cpu")
        numbers = [[10 * unit, 10 * unit + 1] for unit in range(dp)]
        (expected,), _ = reference_steps(name == "tp", [[mlp_lm.batch(i) for unit in numbers for i in unit]])
        batches = [mlp_lm.batch(i) for i in numbers[mesh.get_local_rank("dp")]]
        for compute_dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 3e-2)):
            model = filled(program, mesh, mlp_lm.build(name == "tp").state_dict(), torch.float32, compute_dtype)
            seen = []
            model.layers[0].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.dtype))
            part, _ = accumulate_gradients(model, program, mesh, batches, CPU)
            loss, norm = reduce_loss_and_norm(model, program, mesh, part)
            assert set(seen) == {compute_dtype}
            close(loss, expected[0], "loss", tolerance)
            close(norm, expected[1], "norm", tolerance)
            for key, param in model.named_parameters():
                assert param.dtype == param.grad.dtype == torch.float32
                torch.testing.assert_close(param.grad.full_tensor(), expected[3][key].float(), rtol=tolerance, atol=tolerance)


def test_gradients_are_sums_in_fp32_whatever_the_compute_dtype(tmp_path):
    run_ranks(_mixed_precision, 2, str(tmp_path))


def _resumed(rank, world_size, folder):
    """Three steps, then the state copied into a fresh model and optimizer, then two steps of both."""
    program = variant(f"{folder}/{rank}", "tp")
    mesh = build_mesh(program.MESH, 2, "cpu")
    unit = mesh.get_local_rank("dp")
    steps, models, optimizers = [], [], []
    for _ in range(2):
        models.append(filled(program, mesh, mlp_lm.build(True).state_dict()))
        optimizers.append(build_optimizer(models[-1], **SETTINGS))
        steps.append(TrainStep(models[-1], program, mesh, optimizers[-1], CPU, None))
    assert not [name for name in model_and_optimizer_tensors(models[0], optimizers[0]) if name.startswith("optimizer")]
    for number in range(3):
        steps[0]([mlp_lm.batch(10 * number + unit)])
    saved = model_and_optimizer_tensors(models[0], optimizers[0])
    empty = model_and_optimizer_tensors(models[1], optimizers[1], initialize=True)
    names = {name for name, _ in models[0].named_parameters()}
    kinds = ("model", "optimizer.step", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    assert saved.keys() == empty.keys() == {f"{kind}.{name}" for kind in kinds for name in names}
    for name, tensor in saved.items():
        assert (tensor.shape, tensor.dtype) == (empty[name].shape, empty[name].dtype), name
        assert tensor.shape == () and tensor == 3 if name.startswith("optimizer.step") else isinstance(tensor, DTensor)
        assert not name.startswith("optimizer") or not local_tensor(empty[name]).any()
        with torch.no_grad():
            local_tensor(empty[name]).copy_(local_tensor(tensor))
    for number in range(3, 5):
        first, second = (step([mlp_lm.batch(10 * number + unit)]) for step in steps)
        assert torch.equal(first.loss, second.loss) and torch.equal(first.grad_norm, second.grad_norm)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one.full_tensor(), two.full_tensor()), name


def test_state_filled_in_place_continues_the_same_run(tmp_path):
    run_ranks(_resumed, 4, str(tmp_path))


def _inputs(rank, world_size, folder):
    inputs = {"input_ids": (None, ("sp", "tp")), "labels": ("tp", "sp"), "position_ids": (None, "sp")}
    program = variant(f"{folder}/{rank}", "mixed", INPUTS=inputs)
    program.SHAPES = {**program.SHAPES, "position_ids": (2, 8)}
    mesh = build_mesh(program.MESH, 1, "cpu")
    micro_batch = {"input_ids": torch.arange(16).view(2, 8), "labels": torch.arange(16).view(2, 8)}
    found = {name: tensor.tolist() for name, tensor in local_inputs(program, mesh, micro_batch, CPU).items()}
    messages = []
    for wrong in ({"labels": micro_batch["labels"]}, {**micro_batch, "labels": torch.zeros(2, 9)}):
        with pytest.raises(UserError) as error:
            local_inputs(program, mesh, wrong, CPU)
        messages.append(str(error.value))
    return found, messages


def test_each_rank_takes_its_part_of_the_inputs(tmp_path):
    for rank, (found, messages) in enumerate(run_ranks(_inputs, 4, str(tmp_path))):
        sp, tp = divmod(rank, 2)
        assert found == {
            "input_ids": [[2 * rank, 2 * rank + 1], [8 + 2 * rank, 9 + 2 * rank]],
            "labels": [[8 * tp + 4 * sp + i for i in range(4)]],
            "position_ids": [[4 * sp + i for i in range(4)]] * 2,
        }
        assert "takes input_ids of shape (2, 8) but the data lacks it" in messages[0]
        assert "takes labels of shape (2, 8) but the data has (2, 9)" in messages[1]


def _counted(rank, world_size):
    mesh = build_mesh({"tp": 2}, 2, "cpu")
    unit = mesh.get_local_rank("dp")
    labels = torch.full((2, 4), -100)
    labels[unit, : unit + 2] = 0
    return count_tokens([{"labels": labels}, {"labels": torch.full((2, 4), -100)}], mesh, CPU).item()


def test_tokens_that_count_are_summed_over_scale_units_only():
    assert run_ranks(_counted, 4) == [5] * 4


def _nothing_counts(rank, world_size, folder):
    program = variant(f"{folder}/{rank}", "sp")
    mesh = build_mesh(program.MESH, 1, "cpu")
    model = filled(program, mesh, mlp_lm.build().state_dict())
    batch = {**mlp_lm.batch(0), "labels": torch.full((2, 8), -100)}
    result = TrainStep(model, program, mesh, build_optimizer(model, lr=0.1), CPU, 1.0)([batch])
    return result.loss.item(), result.grad_norm.item(), result.tokens.item()


def test_a_step_without_any_label_changes_nothing(tmp_path):
    assert run_ranks(_nothing_counts, 2, str(tmp_path)) == [(0.0, 0.0, 0)] * 2
