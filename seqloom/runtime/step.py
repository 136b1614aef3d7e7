"""One training step: micro-batches in, updated weights and three numbers out.

A step sees the micro-batches of one scale unit. Each rank takes its part of every input, runs the program forward and backward, and
leaves the summing of gradients to FSDP2 and to the program's own reshards. Three things are global and are treated once:

- the loss is the sum over all tokens of the step divided by the number of those that count, never a mean of means;
- the gradient norm is that of the whole model, each element counted once wherever copies of it lie;
- both are summed by one all-reduce, and nothing makes the host wait for the device: the results are scalars on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from seqloom.errors import UserError
from seqloom.ops.transfer import to_device
from seqloom.runtime.context import Layout, Prepared
from seqloom.runtime.mesh import DP
from seqloom.runtime.optimizer import AnyOptimizer, parts_of
from seqloom.runtime.program import Axes, Program

IGNORED = -100  # the label of a position that does not count
MicroBatch = Mapping[str, Tensor]  # name of an input -> the scale unit's whole tensor `[b, l]`, on the CPU


@dataclass(frozen=True)
class StepResult:
    """What a step reports, as scalars on the device: mean loss per token, global gradient norm before clipping, tokens that count.

    `own_loss` is this rank's part of the loss, `own_norms` the norms of the gradients that it counts, of the parameters `counted`: where
    the loss or the norm is not finite, the weights are as they were, and these tell which tensor of which rank began it.
    """

    loss: Tensor
    grad_norm: Tensor
    tokens: Tensor
    own_loss: Tensor
    own_norms: Tensor
    counted: tuple[str, ...]


class TrainStep:
    """The step of one rank: `result = step(micro_batches)`.

    `max_grad_norm` scales the gradients down to that global norm where they exceed it; None leaves them as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        mesh: DeviceMesh,
        optimizer: AnyOptimizer,
        device: torch.device,
        max_grad_norm: float | None,
    ) -> None:
        self.model, self.program, self.mesh = model, program, mesh
        self.optimizer, self.device, self.max_grad_norm = optimizer, device, max_grad_norm

    def __call__(self, micro_batches: Sequence[MicroBatch | Prepared]) -> StepResult:
        """Accumulate gradients over this scale unit's micro-batches, clip, update the weights, and clear the gradients.

        A step whose loss or gradient norm is not finite leaves weights and optimizer as they were.
        """
        own_loss, tokens = accumulate_gradients(self.model, self.program, self.mesh, micro_batches, self.device)
        counted = counted_gradients(self.model, self.program, self.mesh)
        own_norms = norms_of(list(counted.values()), self.device)
        loss, grad_norm = _sum_over_ranks(self.program, self.mesh, own_loss, own_norms)
        if self.max_grad_norm is not None:
            scale_gradients(self.model, (self.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0))
        update(self.optimizer, loss.isfinite() & grad_norm.isfinite())
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, grad_norm, tokens, own_loss, own_norms, tuple(counted))


def update(optimizer: AnyOptimizer, finite: Tensor) -> None:
    """A step of the optimizer where the boolean scalar `finite` holds.

    A fused optimizer reads it on the device, as it would from a gradient scaler; for others the host waits for it.
    """
    for part in parts_of(optimizer):
        if getattr(part, "_step_supports_amp_scaling", False):
            part.found_inf = (~finite).float()
            part.step()
        elif finite:
            part.step()


def accumulate_gradients(
    model: nn.Module, program: Program, mesh: DeviceMesh, micro_batches: Sequence[MicroBatch | Prepared], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Run every micro-batch forward and backward; the gradients are then those of the mean loss of the whole step.

    Returns this rank's part of that loss, and the number of tokens that count over all scale units. Raises `UserError` for an input
    that the program does not know by name or shape.
    """
    prepared = prepare(program, mesh, micro_batches)
    tokens = count_tokens([batch.inputs for batch in prepared], mesh, device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for index, micro_batch in enumerate(prepared):
        inputs = local_inputs(program, mesh, micro_batch.use(), device)
        _delay_reduction(model, program, last=index == len(micro_batches) - 1)
        part = model(**inputs) / tokens.clamp(min=1)
        part.backward()
        loss += part.detach()
    return loss, tokens


def prepare(program: Program, mesh: DeviceMesh, micro_batches: Sequence[MicroBatch | Prepared]) -> list[Prepared]:
    """Micro-batches laid out for the program; those that were prepared ahead stay as they are."""
    if all(isinstance(batch, Prepared) for batch in micro_batches):
        return list(micro_batches)
    layout = Layout(program, mesh)
    return [batch if isinstance(batch, Prepared) else layout.prepare(batch) for batch in micro_batches]


def count_tokens(micro_batches: Sequence[MicroBatch], mesh: DeviceMesh, device: torch.device) -> Tensor:
    """Tokens of the step whose label counts, over all micro-batches and scale units, as an integer scalar on the device.

    The ranks of a scale unit see the same whole labels, so only `dp` is summed over.
    """
    counts = [(micro_batch["labels"] != IGNORED).sum() for micro_batch in micro_batches]
    tokens = to_device(torch.stack(counts).sum(), device)
    dist.all_reduce(tokens, group=mesh.get_group(DP))
    return tokens


def local_inputs(program: Program, mesh: DeviceMesh, micro_batch: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """This rank's part of each input of the program. Positions count from 0 in each row unless the micro-batch brings its own."""
    inputs = {}
    for name, axes_by_dim in program.INPUTS.items():
        shape = tuple(program.SHAPES[name])
        whole = micro_batch.get(name)
        if whole is None and name == "position_ids":
            whole = torch.arange(shape[-1]).expand(shape)
        if whole is None or tuple(whole.shape) != shape:
            found = "lacks it" if whole is None else f"has {tuple(whole.shape)}"
            raise UserError(f"the program takes {name} of shape {shape} but the data {found}; prepare the data for it or compile again")
        for dim, axes in enumerate(axes_by_dim):
            parts, index = _coordinate(mesh, axes)
            whole = whole.chunk(parts, dim)[index]
        inputs[name] = to_device(whole.contiguous(), device)
    return inputs


def _coordinate(mesh: DeviceMesh, axes: Axes) -> tuple[int, int]:
    """Into how many parts the axes split a dimension, and which of them is this rank's; the earlier axis of the mesh is the outer one."""
    named = (axes,) if isinstance(axes, str) else axes or ()
    parts, index = 1, 0
    for dim, axis in enumerate(mesh.mesh_dim_names):
        if axis in named:
            parts, index = parts * mesh.size(dim), index * mesh.size(dim) + mesh.get_local_rank(axis)
    return parts, index


def _delay_reduction(model: nn.Module, program: Program, last: bool) -> None:
    """What waits for the last micro-batch of a step.

    ZeRO 0 and 1 sum gradients over the ranks once a step, ZeRO 2 and 3 scatter the sums at every micro-batch; those of the replicas of
    a hybrid storage are added up once a step. All but ZeRO 3 keep the gathered weights until then.
    """
    if not isinstance(model, FSDPModule):
        return
    if program.ZERO <= 1:
        model.set_requires_gradient_sync(last)
    else:
        model.set_requires_all_reduce(last)
    if program.ZERO <= 2:
        model.set_reshard_after_backward(last)


def reduce_loss_and_norm(model: nn.Module, program: Program, mesh: DeviceMesh, loss: Tensor) -> tuple[Tensor, Tensor]:
    """The step's loss and the global gradient norm, from this rank's part of the loss and its pieces of the gradients.

    A value that several ranks hold is counted by the first of them only. Squares are summed in fp32 or better, over the ranks in fp64.
    """
    return _sum_over_ranks(program, mesh, loss, norms_of(list(counted_gradients(model, program, mesh).values()), loss.device))


def counted_gradients(model: nn.Module, program: Program, mesh: DeviceMesh) -> dict[str, Tensor]:
    """This rank's pieces of the gradients by parameter, in the model's order; each element is counted by one rank only."""
    named = model.named_parameters()
    return {name: _local(param.grad) for name, param in named if param.grad is not None and _counts(param, program, mesh)}


def norms_of(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The norm of each tensor, in fp32 or better: `[n]` on the device."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float32, device=device)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.promote_types(torch.float32, tensors[0].dtype)))


def _sum_over_ranks(program: Program, mesh: DeviceMesh, own_loss: Tensor, own_norms: Tensor) -> tuple[Tensor, Tensor]:
    copies = [axis for axis in program.MESH if axis not in program.LOSS_PARTIAL]
    counted = own_loss if _first(mesh, copies) else torch.zeros_like(own_loss)
    sums = torch.stack([counted.double(), own_norms.double().square().sum()])
    dist.all_reduce(sums)
    return sums[0], sums[1].sqrt()


def _counts(param: Tensor, program: Program, mesh: DeviceMesh) -> bool:
    """Whether this rank is the first of those that hold its piece of a parameter."""
    if not isinstance(param, DTensor):
        return dist.get_rank() == 0
    axes = param.device_mesh.mesh_dim_names
    coordinate = param.device_mesh.get_coordinate()
    copies = [index for index, placement in zip(coordinate, param.placements, strict=True) if isinstance(placement, Replicate)]
    elsewhere = [axis for axis in program.MESH if axis not in program.SUM_GRADS and axis not in axes]
    return not any(copies) and _first(mesh, elsewhere)


def _first(mesh: DeviceMesh, axes: Iterable[str]) -> bool:
    return all(mesh.get_local_rank(axis) == 0 for axis in axes)


def scale_gradients(model: nn.Module, factor: Tensor) -> None:
    """Multiply every gradient in place by a scalar on the device."""
    gradients = [_local(param.grad) for param in model.parameters() if param.grad is not None]
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))


def _local(tensor: Tensor) -> Tensor:
    """This rank's piece, sharing its memory."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor
