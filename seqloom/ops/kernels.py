"""Which kernel plain attention runs with: the one that the plan was made for, or the fastest that is present; said in the log, once a kind.

Role: `seqloom.ops.attention` asks `kernel_for` with the kind of its tensors. A kernel is present where nothing refuses it: not the device,
the dtype, the head size, PyTorch's own check, nor a package that is absent or has another interface. Of those present

1. `use_kernel(name)`, or the environment variable SEQLOOM_ATTENTION_KERNEL, asks for one, and an absent one is an error;
2. the plan's kernel runs (`follow_plan`); where it is absent a warning names it, the one that runs, and the slowdown to expect;
3. the fastest runs by the rates of the plan's hardware, or of the file in `configs/hardware` that describes the device; kernels without
   rates come after those with, in the order of `KERNELS`.

In compiled code the choice is made when it is compiled. FlashAttention-2 is PyTorch's own copy: the package flash_attn adds nothing to it
for whole sequences.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_efficient_attention, can_use_flash_attention

from seqloom.errors import UserError
from seqloom.ops.installed import refused_on_gpu, refused_package
from seqloom.ops.kernel_rates import AttentionRate, Rates, device_rates

VARIABLE = "SEQLOOM_ATTENTION_KERNEL"
PACKAGE_3, PACKAGE_4 = "flash_attn_interface", "flash_attn.cute.interface"
NAME_3, NAME_4 = "FlashAttention 3 (flash_attn_interface)", "FlashAttention 4 (flash_attn.cute)"
MOST_HEAD_SIZE = {"flash3": 256, "flash4": 128}
_log = logging.getLogger(__name__)


class Kind(NamedTuple):
    """Tensors as a kernel sees them: device, dtype, head size, whether query heads share keys and values, whether sums have one order;
    and whether scores are hidden by a sliding window, or capped.
    """

    device: torch.device
    dtype: torch.dtype
    head_size: int
    grouped: bool
    deterministic: bool = False
    window: bool = False
    softcap: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        marks = {
            "grouped heads": self.grouped,
            "deterministic": self.deterministic,
            "sliding window": self.window,
            "soft cap": self.softcap,
        }
        return ", ".join([self.device.type, dtype, f"head size {self.head_size}", *(name for name, true in marks.items() if true)])


@dataclass(frozen=True)
class Kernel:
    """What may run attention. `refuses` says why tensors of a kind cannot be run here, whatever their mask, or None; `grouped` is whether
    it takes fewer key/value heads than query heads, `window` and `softcap` whether it knows these.
    """

    refuses: Callable[[Kind], str | None]
    grouped: bool = True
    window: bool = False
    softcap: bool = False

    def refusal(self, kind: Kind) -> str | None:
        """Why a kind cannot be run here, to follow "kernel 'name'" in a sentence; None where it can."""
        for wanted, known, name in ((kind.window, self.window, "sliding window"), (kind.softcap, self.softcap, "soft cap")):
            if wanted and not known:
                return f"has no {name}"
        return self.refuses(kind)


@dataclass(frozen=True)
class Wish:
    """What decides between the kernels that are present: one that is `asked` for and how, the plan's, and rates with their `source`."""

    asked: str | None = None
    how: str = ""
    planned: str | None = None
    rates: tuple[tuple[str, AttentionRate], ...] = ()
    source: str = ""


class Choice(NamedTuple):
    """The kernel, None where no fused one takes the tensors; the sentence for the log, and whether it is a warning."""

    kernel: str | None
    sentence: str
    warning: bool = False


# --- what is present -------------------------------------------------------------------------------------------------------------


def _on_cpu(kind: Kind) -> str | None:
    return f"needs a CPU, not {kind.device.type}" if kind.device.type == "cuda" else None


def _by_pytorch(can_use: Callable[[SDPAParams], bool], grouped: bool) -> Callable[[Kind], str | None]:
    """PyTorch's own answer, found on small tensors of the kind; without `grouped` the heads are repeated before the call."""

    def refusal(kind: Kind) -> str | None:
        if kind.device.type != "cuda":
            return f"needs a GPU, not {kind.device.type}"
        shared = kind.grouped and grouped
        with torch.inference_mode(False):
            query, key = (
                torch.empty(1, heads, 64, kind.head_size, dtype=kind.dtype, device=kind.device, requires_grad=True)
                for heads in (2, 1 if shared else 2)
            )
        if can_use(SDPAParams(query, key, key, None, 0.0, True, shared)):
            return None
        dtype, order = str(kind.dtype).removeprefix("torch."), " in one order of sums" * kind.deterministic
        return f"does not take {dtype} with head size {kind.head_size}{order}: so says PyTorch"

    return refusal


def _flash3(kind: Kind) -> str | None:
    gpu = refused_on_gpu(kind.device, kind.dtype, kind.head_size, MOST_HEAD_SIZE["flash3"], (9, 0), (10, 0))
    forward = gpu or refused_package(PACKAGE_3, "_flash_attn_forward", "window_size_left", NAME_3)
    return forward or refused_package(PACKAGE_3, "_flash_attn_backward", "is_causal", NAME_3)


def _flash4(kind: Kind) -> str | None:
    gpu = refused_on_gpu(kind.device, kind.dtype, kind.head_size, MOST_HEAD_SIZE["flash4"], (9, 0), (12, 0))
    forward = gpu or refused_package(PACKAGE_4, "_flash_attn_fwd", "return_lse", NAME_4)
    return forward or refused_package(PACKAGE_4, "_flash_attn_bwd", "deterministic", NAME_4)


KERNELS: Mapping[str, Kernel] = {  # where no table has rates, the first that is present runs
    "flash3": Kernel(_flash3, window=True, softcap=True),
    "flash4": Kernel(_flash4, window=True),
    "cudnn": Kernel(_by_pytorch(can_use_cudnn_attention, grouped=True)),
    "flash2": Kernel(_by_pytorch(can_use_flash_attention, grouped=True), window=True),
    "efficient": Kernel(_by_pytorch(can_use_efficient_attention, grouped=False), grouped=False),
    "flash": Kernel(_on_cpu),
}
ANY_SHAPE = ("flash2", "efficient", "flash")
"""PyTorch's kernels that run a new shape at once. cuDNN first builds a plan for it, and the pieces of documents are ever new shapes."""


# --- what is wished for ----------------------------------------------------------------------------------------------------------


class _Wished:
    """The wish of this process. Not a context variable: a replay of the forward runs in a thread of autograd and must choose alike."""

    now = Wish()


@contextmanager
def follow_plan(kernel: str | None, rates: Rates, source: str) -> Iterator[None]:
    """Inside, attention runs with the kernel that a plan was made for, where it is present; `rates` are those of the plan's hardware,
    which messages call `source`. None and no rates: as without a plan.
    """
    with _wishing(replace(_Wished.now, planned=kernel, rates=tuple(rates.items()), source=source)):
        yield


@contextmanager
def use_kernel(name: str | None) -> Iterator[None]:
    """Inside, attention runs with kernel `name`, or as it is chosen for None. Raises `UserError` for an unknown name; attention itself
    does where the kernel is not present.
    """
    if name is not None:
        _check_name(name, f"use_kernel({name!r})")
    with _wishing(replace(_Wished.now, asked=name, how=f"use_kernel({name!r})" if name else "")):
        yield


@contextmanager
def _wishing(wished: Wish) -> Iterator[None]:
    before, _Wished.now = _Wished.now, wished
    try:
        yield
    finally:
        _Wished.now = before


def _check_name(name: str, how: str) -> None:
    if name not in KERNELS:
        raise UserError(f"{how}: there is no attention kernel '{name}': use one of {', '.join(KERNELS)}")


def wish(kind: Kind) -> Wish:
    """What is asked for, planned and known for tensors of a kind. Raises `UserError` for an unknown name in the environment."""
    found, name = _Wished.now, os.environ.get(VARIABLE)
    if name and found.asked is None:
        _check_name(name, f"{VARIABLE}={name}")
        found = replace(found, asked=name, how=f"{VARIABLE}={name}")
    if found.rates or kind.device.type != "cuda":
        return found
    source, rates = _rates_of(kind.device, kind.dtype)
    return replace(found, rates=tuple(rates.items()), source=source)


def known_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates that kernels on `device` are compared by: those of the plan, or of the file that describes the device; else none."""
    return dict(wish(Kind(device, dtype, 0, False)).rates)


@functools.cache
def _rates_of(device: torch.device, dtype: torch.dtype) -> tuple[str, Rates]:
    described = device_rates(torch.cuda.get_device_name(device), dtype) if torch.cuda.is_available() else None
    return described or ("", {})


# --- the choice ------------------------------------------------------------------------------------------------------------------


def kernel_for(kind: Kind, among: Collection[str] | None = None) -> str | None:
    """The kernel that runs tensors of a kind; None where no fused one does. `among` leaves out all others, and wishes for them.

    Raises `UserError` where a kernel is asked for that is unknown or not present.
    """
    return _decided(kind, wish(kind), None if among is None else tuple(among)).kernel


@functools.cache
def _decided(kind: Kind, wished: Wish, among: tuple[str, ...] | None) -> Choice:
    """The choice, written into the log of rank 0 when it is first made."""
    names = among or tuple(KERNELS)
    wished = replace(wished, asked=_one_of(wished.asked, among), planned=_one_of(wished.planned, among))
    choice = choose(kind, wished, {name: kernel.refusal(kind) for name, kernel in KERNELS.items() if name in names})
    if not dist.is_initialized() or dist.get_rank() == 0:
        _log.log(logging.WARNING if choice.warning else logging.INFO, choice.sentence)
    return choice


def _one_of(name: str | None, among: tuple[str, ...] | None) -> str | None:
    return name if among is None or name in among else None


def choose(kind: Kind, wished: Wish, refusals: Mapping[str, str | None]) -> Choice:
    """The choice between kernels, given why each is refused (None: present), in the order for those without rates.

    Only a GPU warns: a CPU has one kernel, whatever the plan. Raises `UserError` where the kernel that is asked for is refused.
    """
    where, rates, gpu = f"attention on {kind}", dict(wished.rates), kind.device.type == "cuda"
    if wished.asked is not None:
        if refusals[wished.asked] is not None:
            raise UserError(f"{wished.how}: kernel '{wished.asked}' {refusals[wished.asked]}; ask for another, or for none")
        return Choice(wished.asked, f"{where}: kernel '{wished.asked}', by {wished.how}")
    present = [name for name, refusal in refusals.items() if refusal is None]
    if not present:
        return Choice(None, f"{where}: no fused kernel takes these tensors, so the slower explicit path runs", gpu)
    best = min(present, key=lambda name: rates[name].time if name in rates else inf)
    if wished.planned in present:
        return Choice(wished.planned, f"{where}: kernel '{wished.planned}', which the plan is for{_faster(best, wished, rates)}")
    if wished.planned is None:
        why = f"the fastest here by the rates of {wished.source}" if best in rates else "the first of those that are here"
        return Choice(best, f"{where}: kernel '{best}', {why}")
    why = refusals.get(wished.planned) or "does not run plain attention"
    return Choice(best, f"{where}: the plan is for kernel '{wished.planned}', which {why}; {_instead(best, wished, rates)}", gpu)


def _faster(best: str, wished: Wish, rates: Rates) -> str:
    """What a run gives away by following its plan, as the end of a sentence."""
    if best not in rates or wished.planned not in rates or rates[best].time >= rates[wished.planned].time:
        return ""
    share = rates[best].time / rates[wished.planned].time
    return f"; '{best}' is here too and takes {share:.2f} of its time: plan for it with --attention_kernel {best}"


def _instead(best: str, wished: Wish, rates: Rates) -> str:
    """What runs in place of the plan's kernel, and how long it takes."""
    if best not in rates or wished.planned not in rates:
        return f"kernel '{best}' runs instead, and {wished.source or 'no table'} has no rates to compare them"
    times = rates[best].time / rates[wished.planned].time
    return f"kernel '{best}' runs instead and takes {times:.2f} times as long by the rates of {wished.source}"
