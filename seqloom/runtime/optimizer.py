"""Optimizers over distributed parameters, and the state that a checkpoint keeps.

In: a materialized model and what the user chose. Out: an optimizer whose steps run on the local pieces, and flat names for every tensor of
model and optimizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from seqloom.runtime.muon import Muon

MOMENTS = ("exp_avg", "exp_avg_sq")
STATES: Mapping[type[Optimizer], tuple[str, ...]] = {
    AdamW: MOMENTS,
    Adam: MOMENTS,
    NAdam: MOMENTS,
    RAdam: MOMENTS,
    Adamax: ("exp_avg", "exp_inf"),
    RMSprop: ("square_avg",),
    SGD: ("momentum_buffer",),
    Muon: ("momentum_buffer",),
}
"""Tensors of a parameter's shape that an optimizer keeps, all zero before the first step."""
SCALARS: Mapping[type[Optimizer], Mapping[str, float]] = {
    **{kind: {"step": 0.0} for kind in (AdamW, Adam, RAdam, Adamax, RMSprop)},
    NAdam: {"step": 0.0, "mu_product": 1.0},
}
"""Its scalars, with their values before the first step."""
_BLOCK = re.compile(r"\.\d+\.")  # a number in a parameter's name: it belongs to a layer


class Together:
    """Several optimizers of one model as one: each parameter belongs to one of them."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """A step of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)


AnyOptimizer = Optimizer | Together


def build_optimizer(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    *,
    name: str = "adamw",
    momentum: float = 0.95,
    dtype: torch.dtype = torch.bfloat16,
) -> AnyOptimizer:
    """The optimizer called `name` (a key of `OPTIMIZERS`) over the model's pieces; fused where PyTorch has it so.

    Parameters of one dimension (norms, biases) do not decay. Parameters on different meshes go to different groups, because one fused
    call takes tensors of one mesh. `dtype` is that of Muon's matrix products.
    """
    settings = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "dtype": dtype}
    named = list(model.named_parameters())
    if name != "muon":
        return OPTIMIZERS[name](_groups((param for _, param in named), weight_decay), settings)
    matrices = [param for key, param in named if param.dim() == 2 and _BLOCK.search(key)]
    chosen = set(map(id, matrices))
    others = _groups((param for _, param in named if id(param) not in chosen), weight_decay)
    parts = [OPTIMIZERS["muon"](_groups(matrices, weight_decay), settings)] if matrices else []
    return Together(*parts, *([OPTIMIZERS["adamw"](others, settings)] if others else []))


def _groups(params: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameters by mesh and by whether they decay."""
    groups: dict[tuple[object, bool], list[nn.Parameter]] = {}
    for param in params:
        mesh = param.device_mesh if isinstance(param, DTensor) else None
        groups.setdefault((mesh, param.dim() > 1), []).append(param)
    return [{"params": params, "weight_decay": weight_decay if decays else 0.0} for (_, decays), params in groups.items()]


def _adam(kind: type[Optimizer], **more: Any) -> Callable[[list[dict], dict], Optimizer]:
    return lambda groups, chosen: kind(groups, lr=chosen["lr"], betas=chosen["betas"], eps=chosen["eps"], **more)


OPTIMIZERS: Mapping[str, Callable[[list[dict], dict], Optimizer]] = {
    "adamw": _adam(AdamW, fused=True),
    "adam": _adam(Adam, fused=True),
    "nadam": _adam(NAdam, decoupled_weight_decay=True),
    "radam": _adam(RAdam, decoupled_weight_decay=True),
    "adamax": _adam(Adamax),
    "rmsprop": lambda groups, chosen: RMSprop(groups, lr=chosen["lr"], alpha=chosen["betas"][1], eps=chosen["eps"]),
    "sgd": lambda groups, chosen: SGD(groups, lr=chosen["lr"], momentum=chosen["betas"][0]),
    "muon": lambda groups, chosen: Muon(groups, lr=chosen["lr"], momentum=chosen["momentum"], dtype=chosen["dtype"]),
}


def model_and_optimizer_tensors(model: nn.Module, optimizer: AnyOptimizer, initialize: bool = False) -> dict[str, Tensor]:
    """Every tensor of a training state by name: `model.<fqn>` and `optimizer.{exp_avg,exp_avg_sq,step,...}.<fqn>`.

    The tensors are the live ones (DTensors where they are distributed; steps are scalars), so that a load can fill them in place.
    `initialize` makes the optimizer's state before its first step. Without it a missing state is left out.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    owner = {param: part for part in parts_of(optimizer) for group in part.param_groups for param in group["params"]}
    for name, param in model.named_parameters():
        states = owner[param].state
        state = states[param] if initialize or param in states else {}
        if initialize and not state:
            state.update(_initial(type(owner[param]), param))
        tensors.update({f"optimizer.{key}.{name}": value for key, value in state.items() if isinstance(value, Tensor)})
    return tensors


def parts_of(optimizer: AnyOptimizer) -> tuple[Optimizer, ...]:
    """The optimizers of PyTorch that one is made of."""
    return optimizer.optimizers if isinstance(optimizer, Together) else (optimizer,)


def _initial(kind: type[Optimizer], param: nn.Parameter) -> dict[str, Tensor]:
    local = param.to_local() if isinstance(param, DTensor) else param
    scalars = {name: torch.tensor(value, dtype=torch.float32, device=local.device) for name, value in SCALARS.get(kind, {}).items()}
    return {**scalars, **{name: torch.zeros_like(param, requires_grad=False) for name in STATES[kind]}}
