"""AdamW over distributed parameters, and the state that a checkpoint keeps.

In: a materialized model. Out: an optimizer whose steps run on the local pieces, and flat names for every tensor of model and optimizer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(
    model: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0, eps: float = 1e-8
) -> AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over the model's pieces, fused.

    Parameters of one dimension (norms, biases) do not decay. Parameters on different meshes go to different groups, because one fused
    call takes tensors of one mesh.
    """
    groups: dict[tuple[object, bool], list[nn.Parameter]] = {}
    for param in model.parameters():
        mesh = param.device_mesh if isinstance(param, DTensor) else None
        groups.setdefault((mesh, param.dim() > 1), []).append(param)
    return AdamW(
        [{"params": params, "weight_decay": weight_decay if decays else 0.0} for (_, decays), params in groups.items()],
        lr=lr,
        betas=betas,
        eps=eps,
        fused=True,
    )


def model_and_optimizer_tensors(model: nn.Module, optimizer: AdamW, initialize: bool = False) -> dict[str, Tensor]:
    """Every tensor of a training state by name: `model.<fqn>` and `optimizer.{exp_avg,exp_avg_sq,step}.<fqn>`.

    The tensors are the live ones (DTensors where they are distributed; steps are scalars), so that a load can fill them in place.
    `initialize` makes the optimizer's state before its first step: zeros. Without it a missing state is left out.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, param in model.named_parameters():
        state = optimizer.state[param] if initialize or param in optimizer.state else {}
        if initialize and not state:
            local = param.to_local() if isinstance(param, DTensor) else param
            state["step"] = torch.zeros((), dtype=torch.float32, device=local.device)
            state.update({moment: torch.zeros_like(param, requires_grad=False) for moment in MOMENTS})
        tensors.update({f"optimizer.{key}.{name}": tensor for key, tensor in state.items()})
    return tensors
