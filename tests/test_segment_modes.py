"""A program whose layers keep, recompute, keep some, run in tiles or offload trains as the plain model does, over FSDP2 and DTensors."""

import mlp_lm
import pytest
from handwritten import check_gradients, check_training, filled, reference_steps, variant
from procs import run_ranks
from torch.distributed.tensor import DTensor

from seqloom.runtime import offload as offload_module
from seqloom.runtime.compiled import compile_blocks
from seqloom.runtime.mesh import build_mesh

MODES = ("keep", "recompute", "selective", "tiles", "offload")


def _watch_copies(model):
    """Let every storage leave, however small, and count those that do; none of them may be a parameter's."""
    offload_module.MINIMUM = 0
    init, copied = offload_module._Copy.__init__, []

    def watched(copy, call, tensor):
        held = {offload_module._address(p._local_tensor if isinstance(p, DTensor) else p) for p in model.parameters()}
        assert offload_module._address(tensor) not in held
        copied.append(tensor.shape)
        init(copy, call, tensor)

    offload_module._Copy.__init__ = watched
    return copied


def _train(rank, world_size, folder):
    offload_module.MINIMUM = 0
    pairs = zip(MODES, (*MODES[1:], MODES[0]), strict=True)
    for zero, modes in [*((3, pair) for pair in pairs), (2, ("tiles", "offload"))]:
        program = variant(f"{folder}/{rank}/{zero}{modes[0]}", "segments", ZERO=zero, MODES=modes)
        check_training(program, build_mesh(program.MESH, 1, "cpu"), 1, False, 2, 2, f"ZeRO {zero}, {modes}")


def test_every_mode_trains_as_the_plain_model(tmp_path):
    run_ranks(_train, 2, str(tmp_path))


def offloaded(text):
    """The program `mixed` with offloaded blocks in place of recomputed ones."""
    text = text.replace("checkpoint(self.mlp, x, use_reentrant=False)", "offload(self.mlp, x)")
    return text.replace("from torch.utils.checkpoint import checkpoint\n", "from seqloom.runtime.offload import offload\n")


def _weights_stay(rank, world_size, folder):
    counts = []
    for name, edit, plan_mesh in (("segments", str, {"sp": 4}), ("mixed", offloaded, {"sp": 2, "tp": 2})):
        program = variant(f"{folder}/{rank}/{name}", name, edit, MESH=plan_mesh, MODES=("offload", "offload"))
        mesh = build_mesh(plan_mesh, 1, "cpu")
        (expected,), _ = reference_steps(False, [[mlp_lm.batch(0)]])
        model = filled(program, mesh, mlp_lm.build().state_dict())
        copied = _watch_copies(model)
        check_gradients(model, program, mesh, [mlp_lm.batch(0)], expected, name)
        counts.append(len(copied))
    return counts


def test_gathered_and_split_weights_stay_on_the_device(tmp_path):
    for segments, mixed in run_ranks(_weights_stay, 4, str(tmp_path)):
        assert segments >= 2 * 4 and mixed >= 2 * 4


def _compiled(rank, world_size, folder, modes):
    program = variant(f"{folder}/{rank}", "segments", MODES=modes)
    mesh = build_mesh(program.MESH, 1, "cpu")
    (expected,), _ = reference_steps(False, [[mlp_lm.batch(0)]])
    model = filled(program, mesh, mlp_lm.build().state_dict())
    compile_blocks(model, program, "aot_eager")
    check_gradients(model, program, mesh, [mlp_lm.batch(0)], expected, "compiled")


@pytest.mark.parametrize("modes", [("selective", "tiles"), ("offload", "recompute"), ("keep", "keep")], ids=" ".join)
def test_blocks_compile_whole_in_every_mode(modes, tmp_path):
    """Each of the two segments, and a kept or tiled form of them: no more graphs than that, forward and backward."""
    run_ranks(_compiled, 2, str(tmp_path), modes)
