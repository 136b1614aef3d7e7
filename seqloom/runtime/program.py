"""Loads an emitted program: `.seqloom/<name>/program.py` becomes a Python module with the names of the contract.

In: the folder that a compile left. Out: the module, checked to have every name that the runtime reads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import nn
from torch.distributed.tensor.placement_types import Placement

from seqloom.errors import UserError
from seqloom.runtime.mesh import DP

PROGRAM_FILE = "program.py"
Axes = str | tuple[str, ...] | None


class Program(Protocol):
    """What an emitted program offers; docs/architecture.md gives the meaning of each name."""

    MESH: Mapping[str, int]
    INPUTS: Mapping[str, tuple[Axes, ...]]
    SHAPES: Mapping[str, tuple[int, ...]]
    LOSS_PARTIAL: tuple[str, ...]
    PLACEMENTS: Mapping[str, Mapping[str, Placement]]
    SUM_GRADS: tuple[str, ...]
    ZERO: int
    SHARDED: tuple[str, ...]
    TIED: Mapping[str, str]
    MODEL: type[nn.Module]
    BLOCKS: tuple[type[nn.Module], ...]
    FUSED: bool


def load_program(folder: Path | str) -> Program:
    """Import the program of a compile folder under a module name of its own.

    Modules of the working directory (the user's custom operators) can be imported by the program. Raises `UserError` where the folder
    has no program, the program cannot be imported, or a name of the contract is missing.
    """
    path = Path(folder) / PROGRAM_FILE
    if not path.is_file():
        raise UserError(f"there is no compiled program at {path}; compile it first with `python train.py --run_mode compile`")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:12]
    name = f"seqloom_program_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"the program {path} cannot be loaded ({type(error).__name__}: {error}); mend it or compile it again") from error
    missing = [field for field in Program.__annotations__ if field not in ("SHARDED", "FUSED") and not hasattr(module, field)]
    if missing:
        raise UserError(f"{path} is not a program of seqloom: it lacks {', '.join(missing)}; compile it again")
    if not hasattr(module, "SHARDED"):
        module.SHARDED = (DP, *module.SUM_GRADS) if module.ZERO else ()
    if not hasattr(module, "FUSED"):
        module.FUSED = False  # programs of a time when plans counted on no compiler
    _check_storage(module, path)
    return module


def _check_storage(program: Program, path: Path) -> None:
    """Refuse a ZeRO level that does not exist, and storage that it does not allow."""
    if program.ZERO not in (0, 1, 2, 3):
        raise UserError(f"ZERO = {program.ZERO!r} in {path} is no ZeRO level: use 0, 1, 2 or 3")
    allowed = (DP, *program.SUM_GRADS) if program.ZERO else ()
    wrong = [axis for axis in program.SHARDED if axis not in allowed]
    if wrong:
        raise UserError(
            f"SHARDED in {path} names {wrong[0]!r}, but storage at ZERO = {program.ZERO} may be sharded over {allowed} only: mend it"
        )
